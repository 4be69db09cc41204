"""What trainers keep for their logs as they compute a loss, in a second pass that is not to count."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from copy import copy
from typing import Any

# Where TRL's trainers keep metrics: by mode and name, or by name; lists of numbers, and counts of tokens.
_NAMES = ("_metrics", "_stored_metrics", "_total_train_tokens", "_logs", "_textual_logs")


@contextmanager
def unchanged_metrics(trainer: Any) -> Generator[None]:
    """Puts what a trainer has kept for its logs back at the end."""
    before = {name: _copied(vars(trainer)[name]) for name in _NAMES if name in vars(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(before)


def _copied(value: Any) -> Any:
    """Dictionaries, lists and deques of any depth anew, of the same things."""
    if isinstance(value, dict):
        found = copy(value)
        found.update({key: _copied(part) for key, part in value.items()})
        return found
    return copy(value) if isinstance(value, list | deque) else value

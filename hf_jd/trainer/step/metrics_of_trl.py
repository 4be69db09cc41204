"""Restore the metrics that TRL's trainers collect with each loss, after a second pass that must not count."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from copy import copy
from typing import Any

# Where TRL's trainers store metrics: by mode and name, or by name; lists of numbers, and counts of tokens.
_NAMES = ("_metrics", "_stored_metrics", "_total_train_tokens", "_logs", "_textual_logs")


@contextmanager
def unchanged_metrics(trainer: Any) -> Generator[None]:
    """Restore a trainer's stored metrics on exit."""
    before = {name: _copied(vars(trainer)[name]) for name in _NAMES if name in vars(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(before)


def _copied(value: Any) -> Any:
    """Copy nested dictionaries, lists and deques, but not their contents."""
    if isinstance(value, dict):
        duplicate = copy(value)
        duplicate.update({key: _copied(part) for key, part in value.items()})
        return duplicate
    return copy(value) if isinstance(value, list | deque) else value

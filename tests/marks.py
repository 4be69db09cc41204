"""Mark the cases of a test that `make test` leaves out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """Mark a case that only `make test-all` runs, because a quick case checks the same."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


def in_turn(names: Iterable[Any], values: Mapping[str, Any]) -> list[Any]:
    """Return each name with each value; `make test` runs each name once, with the values in turn."""
    return [
        (pytest.param if j == i % len(values) else slow)(name, value, id=f"{getattr(name, 'id', name)}-{key}")
        for i, name in enumerate(names)
        for j, (key, value) in enumerate(values.items())
    ]

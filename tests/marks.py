"""What `make test` leaves out of a test's cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """A case that only `make test-all` runs: another one shows the same in small."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


def in_turn(names: Iterable[Any], values: Mapping[str, Any]) -> list[Any]:
    """Each name with each value; `make test` has each name once, and the values in turn."""
    return [
        (pytest.param if j == i % len(values) else slow)(name, value, id=f"{getattr(name, 'id', name)}-{key}")
        for i, name in enumerate(names)
        for j, (key, value) in enumerate(values.items())
    ]

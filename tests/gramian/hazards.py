"""Shared by the hazard tests: shapes, and the check of one head."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.gramian.oracle import (
    assert_engine_right,
)
from tests.gramian.zoo import VOCABULARY, Head, losses_of, model_of

DISTINCT, SQUARE = [(3, 7), (3, 5)], [(5, 5), (5, 5)]


def right(head: Head, shapes: list[tuple[int, int]]) -> dict[str, int]:
    model = model_of(head)
    return assert_engine_right(model, losses_of(model, head, shapes))


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

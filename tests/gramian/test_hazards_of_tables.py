"""Failures of engines like this one: tables without a batch dimension. Docstrings say what went wrong, and where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.gramian.hazards import DISTINCT, SQUARE, ids, right
from tests.gramian.oracle import assert_engine_right
from tests.gramian.zoo import Head


@pytest.mark.parametrize("shapes", [DISTINCT, SQUARE], ids=["distinct", "B==T"])
@pytest.mark.parametrize(
    "head",
    [
        *[Head("decoder", f) for f in ("gpt2", "openai-gpt")],
        *[Head("encoder", f) for f in ("bert", "albert", "distilbert", "electra", "convbert", "roberta")],
    ],
    ids=lambda head: head.family,
)
def test_01_position_embedding_without_batch(head: Head, shapes: list[tuple[int, int]]):
    """1 (opacus#841, #845): a position table gets [1, T], and its gradient arrives summed over the batch."""
    tiers = right(head, shapes)
    positions = [t for n, t in tiers.items() if "position" in n or "wpe" in n]
    assert positions
    assert 0 not in positions


@pytest.mark.parametrize("shapes", [DISTINCT, SQUARE], ids=["distinct", "B==T"])
def test_01_position_embedding_of_words_in_time_first_order(shapes: list[tuple[int, int]]):
    """1: positions [T] are added to words [T, B], whose gradient still has the rows that the sum has lost."""
    torch.manual_seed(0)
    words, positions, head = nn.Embedding(30, 8), nn.Embedding(16, 8), nn.Linear(8, 3)
    model = nn.ModuleList([words, positions, head]).double()

    def losses(step: int) -> Tensor:
        tokens = (ids(*shapes[step], seed=step) % 30).T
        return head((words(tokens) + positions(torch.arange(len(tokens)))[:, None]).sin()).sin().sum((0, 2))

    assert set(assert_engine_right(model, losses).values()) == {1}


@pytest.mark.parametrize("shapes", [DISTINCT, SQUARE, [(2, 6), (2, 4)]], ids=["distinct", "B==T", "B=2"])
@pytest.mark.parametrize(
    "head",
    [
        Head("encoder", "mpnet"),
        *[Head("encoder-decoder", f) for f in ("t5", "mt5", "switch_transformers", "umt5")],
    ],
    ids=lambda head: head.family,
)
def test_02_relative_position_tables(head: Head, shapes: list[tuple[int, int]]):
    """2 (private-transformers, swap_t5): tables [T, T].

    For MPNet with B == T, the rows add up to the gradient, and yet the Gramian is wrong by 103 %.
    """
    right(head, shapes)

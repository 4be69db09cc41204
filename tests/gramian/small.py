"""Small models, batches and losses for the tests of the engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_jd.gramian import Engine
from tests.gramian.oracle import (
    EXACT,
    brute_gramian,
    brute_rows,
    relative,
    trainable,
)
from tests.models import VOCABULARY

B, T, WIDTH = 3, 5, 8


def mlp(*, seed: int = 0, inputs: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6)).double()


def batch(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def token_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def lm_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Compute the cross-entropy of the next token, summed over each instance [B]."""
    logits = model(input_ids=ids).logits.double()
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(1)


def assert_gramian(engine: Engine, losses: Tensor, *modules: nn.Module, tolerance: float = EXACT, **kwargs) -> Tensor:
    expected = brute_gramian(brute_rows(losses, list(trainable(*modules))), losses.shape)
    gramian = engine.compute_gramian(losses, **kwargs)
    assert gramian.shape == expected.shape
    assert relative(gramian, expected) < tolerance
    return gramian

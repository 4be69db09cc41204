"""Activation checkpointing, reentrant or not, of all layers or of some."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_jd.gramian import Engine
from tests.gramian.oracle import (
    assert_engine_right,
    check_step,
    trainable,
)
from tests.gramian.small import WIDTH, B, T, batch, lm_losses, token_ids
from tests.models import tiny_gpt2, with_lora


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("adapters", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing(reentrant: bool, adapters: bool, dropout: float):
    model = tiny_gpt2(dropout=dropout)
    if adapters:
        model = with_lora(model, dropout=dropout, warm=True)
        model.enable_input_require_grads()
    base = model.get_base_model() if adapters else model
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()

    def losses(step: int) -> Tensor:
        return lm_losses(model, token_ids(B, 6, seed=step))

    assert_engine_right(model, losses)


class Blocks(nn.Module):
    """Three blocks, some of which are checkpointed."""

    def __init__(self, checkpointed: dict[int, bool]):
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.first, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            if i in self.checkpointed:
                x = checkpoint(block, x, use_reentrant=self.checkpointed[i])
            else:
                x = block(x)
        return self.last(x)


@pytest.mark.parametrize(
    "checkpointed", [{1: True}, {1: False}, {0: True, 2: False}, {0: True, 1: True, 2: True}, {0: False, 1: False}]
)
def test_checkpointing_of_some_layers(checkpointed: dict[int, bool]):
    model = Blocks(checkpointed)
    assert_engine_right(model, lambda step: model(batch(B, 4, seed=step)).square().sum(1), steps=3)


@pytest.mark.parametrize("keep_rows", [True, False])
def test_reentrant_checkpointing_leaves_gradients_alone(keep_rows: bool):
    """With it, a plain backward runs, and every `.grad` is restored, also of outside parameters and inputs."""
    model = Blocks({1: True})
    engine = Engine(model.blocks, keep_rows=keep_rows)
    kept = {p: torch.ones_like(p) if i % 2 else None for i, p in enumerate(model.parameters())}
    for p, gradient in kept.items():
        p.grad = gradient
    x = batch(B, 4).requires_grad_()
    for _ in range(2):
        engine.compute_gramian(model(x).square().sum(1))
        assert x.grad is None
        for p, gradient in kept.items():
            assert p.grad is gradient
            assert gradient is None or bool((gradient == 1).all())


def test_checkpointed_layer_whose_part_is_never_called():
    """Setting a tap on the parent between two Gramians of one forward would change what its recomputation saves."""
    torch.manual_seed(0)
    model = nn.ModuleList(
        [nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 1, 5, dropout=0.0, batch_first=True)]
    ).double()
    for p in (model[1].self_attn.in_proj_weight, model[1].self_attn.in_proj_bias):
        p.requires_grad_(False)

    def losses(step: int) -> Tensor:
        y = checkpoint(model[1], model[0](batch(B, T, 4, seed=step)), use_reentrant=False)
        return (y - torch.arange(4).sin()).square().sum((1, 2))

    assert_engine_right(model, losses, steps=3)


def test_checkpointing_switched_on_and_off():
    model = Blocks({})
    engine = Engine(model)
    for checkpointed in ({}, {1: True}, {0: False}, {}, {0: True, 1: True, 2: True}):
        model.checkpointed = checkpointed
        errors = check_step(engine, trainable(model), model(batch(B, 4)).square().sum(1))
        assert not errors

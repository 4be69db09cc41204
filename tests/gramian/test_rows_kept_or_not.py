"""Gramian and update are the same whether rows are stored or not, and nothing else changes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from hf_jd.gramian import Engine
from tests.gramian.oracle import (
    EXACT,
    SINGLE,
    TIER_3,
    brute_rows,
    brute_update,
    relative,
    trainable,
)
from tests.gramian.small import B, T, assert_gramian, batch, lm_losses, mlp, token_ids
from tests.models import tiny_llama, with_lora


@pytest.mark.parametrize("adapters", [True, False], ids=["LoRA", "full"])
def test_all_modes_give_the_same_gramian_and_update(adapters: bool):
    model = tiny_llama()
    model = with_lora(model, warm=True) if adapters else model
    names = list(trainable(model))
    modes = [True, False, "auto", 0, 20_000, 100_000, 10**9]
    results = []
    for mode in modes:
        engine = Engine(model, keep_rows=mode)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            gramian = engine.compute_gramian(lm_losses(model, token_ids(4, 6)))
        model.zero_grad()
        engine.accumulate_grad(gramian.sum(1))
        results.append((gramian, [p.grad.clone() for p in names]))
        engine.detach()
    for gramian, update in results[1:]:
        assert relative(gramian, results[0][0]) < SINGLE
        assert all(relative(a, b) < SINGLE for a, b in zip(update, results[0][1], strict=True))


class ReadOutside(nn.Module):
    """A layer, and a large matrix that the loss reads directly (tier 3)."""

    def __init__(self):
        super().__init__()
        self.layer, self.matrix = nn.Linear(4, 4), nn.Parameter(torch.randn(30, 40))

    def losses(self, step: int) -> Tensor:
        scale = self.matrix.sin().sum() + torch.arange(B)
        return self.layer(batch(B, 4, seed=step)).square().sum(1) * scale


@pytest.mark.parametrize("budget", [0, 1_000, 3_000, 10_000, 20_000, 40_000, 100_000, 1_000_000])
@pytest.mark.parametrize("kind", ["read outside", "llama"])
def test_stored_rows_stay_within_the_budget(kind: str, budget: int):
    """Store rows, factors or nothing, never more bytes than allowed, whichever tier formed them."""
    torch.manual_seed(0)
    model = ReadOutside().double() if kind == "read outside" else tiny_llama()
    engine = Engine(model, keep_rows=budget)
    for step in range(2):  # The first step finds out which tier forms the rows.
        losses = model.losses(step) if kind == "read outside" else lm_losses(model, token_ids(3, 5, seed=step))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert_gramian(engine, losses, model, tolerance=SINGLE)
        assert engine._step is not None
        kept = engine._step.source
        assert isinstance(kept, Tensor) or kept.nbytes <= budget


def test_accumulate_several_times():
    model = mlp()
    engine = Engine(model)
    losses = model(batch(B, 4)).square().sum(1)
    engine.compute_gramian(losses)
    names = list(trainable(model))
    weights = [torch.rand(B, dtype=torch.float64) for _ in range(3)]
    expected = brute_update(brute_rows(losses, names), sum(weights))
    for w in weights:
        engine.accumulate_grad(w)
    assert all(relative(p.grad, expected[p]) < EXACT for p in names)


def test_a_parameter_used_with_and_without_a_batch_counts_once():
    """DeBERTa's projections see tokens and relative positions."""
    layer, table = nn.Linear(4, 4).double(), batch(2 * T + 1, 4)
    engine = Engine(layer, keep_rows=False)
    x = batch(B, T, 4)
    losses = (layer(x) @ layer(table).T).square().sum((1, 2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", TIER_3)
        for _ in range(2):  # The second time, no forward shows how often the layer is used.
            assert_gramian(engine, losses, layer)


@pytest.mark.parametrize("keep_rows", [True, False])
def test_losses_can_be_differentiated_afterwards(keep_rows: bool):
    """As in TorchJD: the graph is retained, and the engine's hooks ignore this backward."""
    model = mlp()
    engine = Engine(model, keep_rows=keep_rows)
    losses = model(batch(B, 4)).square().sum(1)
    engine.compute_gramian(losses)
    weights = torch.rand(B, dtype=torch.float64)
    names = list(trainable(model))
    expected = brute_update(brute_rows(losses, names), weights)
    losses.backward(weights)
    assert all(relative(p.grad, expected[p]) < EXACT for p in names)


def test_the_gramian_leaves_gradients_and_their_hooks_alone():
    model = mlp()
    engine = Engine(model)
    hooked = []
    first, *rest = model.parameters()
    handles = [first.register_hook(lambda g: hooked.append("hook"))]
    handles.append(first.register_post_accumulate_grad_hook(lambda p: hooked.append("accumulated")))
    kept = torch.ones_like(first)
    first.grad = kept
    engine.compute_gramian(model(batch(B, 4)).square().sum(1))
    assert first.grad is kept
    assert all(p.grad is None for p in rest)
    del hooked[:]  # The first step's self-check computes a plain gradient.
    engine.compute_gramian(model(batch(B, 4)).square().sum(1))
    assert hooked == []
    assert bool((first.grad == 1).all())
    for handle in handles:
        handle.remove()


def test_global_random_state_is_left_alone():
    model = mlp()
    losses = model(batch(B, 4)).square().sum(1)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    Engine(model).compute_gramian(losses)
    assert torch.equal(torch.rand(1), expected)

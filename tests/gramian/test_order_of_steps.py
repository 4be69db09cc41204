"""Forwards, backwards and engines in any order."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from hf_jd.gramian import Engine
from tests.gramian.oracle import (
    EXACT,
    SINGLE,
    assert_engine_right,
    brute_rows,
    brute_update,
    check_step,
    relative,
    trainable,
)
from tests.gramian.small import WIDTH, B, T, assert_gramian, batch, lm_losses, mlp, token_ids
from tests.models import tiny_gpt2, tiny_llama, with_lora


def test_two_forwards_then_two_backwards():
    model = mlp()
    engine = Engine(model)
    first = model(batch(B, 4, seed=1)).square().sum(1)
    second = model(batch(4, 4, seed=2)).square().sum(1)
    for losses in (first, second):
        assert_gramian(engine, losses, model)


def test_two_forwards_then_two_backwards_in_reverse():
    model = mlp()
    engine = Engine(model, keep_rows=False)
    first = model(batch(B, 4, seed=1)).square().sum(1)
    second = model(batch(B, 4, seed=2)).square().sum(1)
    for losses in (second, first):
        assert_gramian(engine, losses, model)


def test_losses_of_two_forwards_in_one_vector():
    """The user calls a module twice: the rows of both calls are added."""
    model = mlp()
    assert_engine_right(
        model, lambda step: (model(batch(B, 4, seed=step)) - model(batch(B, 4, seed=step + 9))).square().sum(1)
    )


def test_two_models_in_one_engine():
    encoder, decoder = mlp(seed=0), mlp(seed=1, inputs=6)
    losses = lambda step: decoder(encoder(batch(B, 4, seed=step))).square().sum(1)  # noqa: E731
    tiers = assert_engine_right([encoder, decoder], losses)
    assert len(tiers) == 12


def test_submodule_gives_the_partial_gramian():
    model = mlp()
    tiers = assert_engine_right(model[3], lambda step: model(batch(B, 4, seed=step)).square().sum(1))
    assert list(tiers) == ["weight", "bias"]


def test_two_pass_reaches_parameters_outside_the_engine():
    model = mlp()
    engine = Engine(model[3], keep_rows=False)
    losses = model(batch(B, 4)).square().sum(1)
    engine.compute_gramian(losses)
    weights = torch.rand(B, dtype=torch.float64)
    names = list(trainable(model))
    expected = brute_update(brute_rows(losses, names), weights)
    engine.accumulate_grad(weights)
    assert all(relative(p.grad, expected[p]) < EXACT for p in names)


def test_two_engines_on_one_model():
    model = mlp()
    whole, part = Engine(model), Engine(model[0])
    losses = model(batch(B, 4)).square().sum(1)
    assert_gramian(whole, losses, model)
    assert_gramian(part, losses, model[0])


def test_a_second_engine_ignores_calls_that_the_first_repeats():
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.PReLU(), nn.ConvTranspose1d(WIDTH, 2, 1)).double()
    engines = [Engine(model), Engine(model)]
    for engine in engines:
        losses = model[2](model[:2](batch(B, T, 4)).transpose(1, 2)).square().sum((1, 2))
        assert_gramian(engine, losses, model)
        assert set(engine.tiers().values()) == {1, 2}


def test_memory_stays_flat_over_forwards_without_backward():
    model = mlp()
    engine = Engine(model)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    assert_gramian(engine, model(batch(B, 4)).square().sum(1), model)
    for _ in range(10):
        model(batch(B, 4))
    before = tensors()
    for i in range(1000):
        with torch.set_grad_enabled(i % 2 == 0):
            model(batch(B, 4))
    assert tensors() <= before + 2
    assert_gramian(engine, model(batch(B, 4)).square().sum(1), model)


def test_forwards_of_other_kinds_between_steps():
    model = tiny_llama()
    engine = Engine(model)
    for step in range(3):
        losses = lm_losses(model.train(), token_ids(B, 6, seed=step))
        assert_gramian(engine, losses, model, tolerance=SINGLE)
        model.eval()
        with torch.no_grad():
            model(token_ids(2, 4))
        with torch.inference_mode():
            model(token_ids(5, 3))
        model(token_ids(2, 6))


def test_no_grad_forward_between_forward_and_backward():
    model = mlp()
    engine = Engine(model)
    losses = model(batch(B, 4)).square().sum(1)
    with torch.no_grad():
        model(batch(7, 4))
    model(batch(2, 4))  # This forward is never differentiated.
    assert_gramian(engine, losses, model)


@pytest.mark.parametrize("keep_rows", [True, False])
def test_dropout(keep_rows: bool):
    """Engine and oracle share one forward: rows follow the masks that were drawn."""
    model = with_lora(tiny_gpt2(dropout=0.3), dropout=0.3, warm=True).train()
    engine = Engine(model, keep_rows=keep_rows)
    for step in range(3):
        losses = lm_losses(model, token_ids(B, 6, seed=step))
        errors = check_step(engine, trainable(model), losses, keep_rows=[keep_rows])
        assert not errors


def test_train_and_eval():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.Dropout(0.4), nn.Tanh(), nn.Linear(WIDTH, 2)).double()
    engine = Engine(model)
    for mode in (True, False, True):
        model.train(mode)
        assert_gramian(engine, model(batch(B, 4)).square().sum(1), model)

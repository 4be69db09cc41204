"""Autocast, loss scaling, and the dtypes of results."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_jd.gramian import Engine
from tests.gramian.oracle import (
    EXACT,
    brute_gramian,
    brute_rows,
    brute_update,
    relative,
    trainable,
)
from tests.gramian.small import B, batch, lm_losses, mlp, token_ids
from tests.models import tiny_llama, with_lora


def test_autocast_bfloat16():
    model = with_lora(tiny_llama(), warm=True).float()
    engine = Engine(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = lm_losses(model, token_ids(4, 6))
    expected = brute_gramian(brute_rows(losses, list(trainable(model))), losses.shape)
    gramian = engine.compute_gramian(losses)
    assert gramian.dtype == torch.float32
    assert relative(gramian, expected) < 0.05
    engine.accumulate_grad(torch.ones(4))
    assert all(p.grad.dtype == torch.float32 for p in trainable(model))


def test_gramian_inside_autocast():
    """Rows are formed in the dtypes of the backward, even if the caller forgot to leave autocast."""
    model = mlp().float()
    engine = Engine(model)
    losses = model(batch(B, 4).float()).square().sum(1)
    outside = engine.compute_gramian(losses)
    with torch.autocast("cpu", torch.bfloat16):
        inside = engine.compute_gramian(losses)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_float16_with_loss_scaling():
    """Scaled losses give a scaled Gramian, which the caller unscales; rows of float32 parameters stay finite."""
    model = mlp().float()
    engine = Engine(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = batch(B, 4).float()
    plain = engine.compute_gramian(model(x).square().sum(1))
    with torch.autocast("cpu", torch.float16):
        losses = model(x).square().float().sum(1)
    gramian = engine.compute_gramian(scaler.scale(losses))
    assert relative(gramian / scaler.get_scale() ** 2, plain) < 0.02
    engine.accumulate_grad(torch.ones(B))
    scaler.unscale_(optimizer)
    names = list(trainable(model))
    expected = brute_update(brute_rows(model(x).square().sum(1), names), torch.ones(B))
    assert all(relative(p.grad, expected[p]) < 0.02 for p in names)
    scaler.step(optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_results(dtype: torch.dtype):
    model = mlp().to(dtype)
    engine = Engine(model)
    losses = model(batch(B, 4).to(dtype)).float().square().sum(1)
    gramian = engine.compute_gramian(losses)
    assert gramian.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    engine.accumulate_grad(torch.ones(B))
    assert all(p.grad.dtype == dtype for p in model.parameters())


def test_long_rows_in_float32():
    """With ten million columns, a single float32 product is off by 1.7e-3."""
    torch.manual_seed(0)
    model = nn.Linear(3200, 3200, bias=False)
    engine = Engine(model, check=False)
    x, target = torch.randn(2, 40, 3200) + 1.0, torch.randn(2, 40, 3200)
    y = model(x)
    gramian = engine.compute_gramian((y * target).sum((1, 2)))
    products = (x.flatten(0, 1).double() @ x.flatten(0, 1).double().T) * (
        target.flatten(0, 1).double() @ target.flatten(0, 1).double().T
    )
    expected = products.view(2, 40, 2, 40).sum((1, 3))
    assert float(((gramian - expected) / expected.diagonal().min()).abs().max()) < 1e-5


def test_gramian_is_symmetric_and_scales_with_the_losses():
    model = mlp()
    engine = Engine(model)
    one = engine.compute_gramian(model(batch(5, 4)).square().sum(1))
    assert torch.equal(one, one.T)
    small = engine.compute_gramian(1e-8 * model(batch(5, 4)).square().sum(1))
    assert relative(small * 1e16, one) < EXACT

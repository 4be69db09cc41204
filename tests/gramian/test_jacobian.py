"""The Jacobian as an object."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from hf_jd.gramian import Engine, Jacobian
from tests.gramian.oracle import (
    EXACT,
    brute_rows,
    relative,
    trainable,
)
from tests.gramian.small import B, batch, lm_losses, mlp, token_ids
from tests.models import tiny_gpt2


@pytest.fixture
def jacobians() -> tuple[list[Jacobian], list[Tensor], list[nn.Parameter]]:
    """Return Jacobians of a tied GPT-2 over three batches, and dense matrices; rows are dense, sparse and outer."""
    model = tiny_gpt2()
    names = list(trainable(model))
    engine = Engine(model)
    actual, dense = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for step, (rows, length) in enumerate(((3, 4), (3, 2), (2, 7))):
            losses = lm_losses(model, token_ids(rows, length, seed=step))
            actual.append(engine.compute_jacobian(losses, materialise=step == 0))
            brute = brute_rows(losses, names)
            dense.append(torch.cat([torch.zeros(rows, p.numel()) if brute[p] is None else brute[p] for p in names], 1))
    return actual, dense, names


def close(jacobian: Jacobian, dense: Tensor) -> bool:
    weights = torch.rand(len(dense), dtype=torch.float64)
    update = jacobian.weighted_sum(weights)
    flat = torch.cat([update.get(p, torch.zeros_like(p)).flatten() for p in jacobian.parameters])
    return (
        len(jacobian) == len(dense)
        and relative(jacobian.dense(), dense) < EXACT
        and relative(jacobian.gramian(), dense @ dense.T) < EXACT
        and relative(flat, weights @ dense) < EXACT
    )


def test_jacobian_equals_brute_force(jacobians):
    for jacobian, dense in zip(*jacobians[:2], strict=True):
        assert close(jacobian, dense)


def test_jacobian_cat(jacobians):
    actual, dense, _ = jacobians
    assert close(Jacobian.cat(actual), torch.cat(dense))
    assert close(Jacobian.cat([actual[2]]), dense[2])


def test_jacobian_add(jacobians):
    actual, dense, _ = jacobians
    assert close(actual[0] + actual[1], dense[0] + dense[1])


@pytest.mark.parametrize("index", [[0, 2], [2, 0], [1], [0, 1, 2]])
def test_jacobian_select(jacobians, index: list[int]):
    actual, dense, _ = jacobians
    for jacobian, matrix in zip(actual[:2], dense[:2], strict=True):
        assert close(jacobian.select(torch.tensor(index)), matrix[index])


def test_jacobian_select_after_cat(jacobians):
    actual, dense, _ = jacobians
    index = torch.tensor([7, 0, 4])
    assert close(Jacobian.cat(actual).select(index), torch.cat(dense)[index])


def test_jacobian_select_drops_nonfinite_rows(jacobians):
    actual, dense, _ = jacobians
    spoilt = actual[1].scaled(torch.tensor([1.0, float("nan"), 1.0], dtype=torch.float64))
    assert close(spoilt.select(torch.tensor([0, 2])), dense[1][[0, 2]])


def test_jacobian_scaled(jacobians):
    actual, dense, _ = jacobians
    factors = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)
    for jacobian, matrix in zip(actual[:2], dense[:2], strict=True):
        assert close(jacobian.scaled(factors), factors[:, None] * matrix)


def test_jacobian_of_unused_parameters(jacobians):
    model = nn.ModuleList([mlp(seed=0), mlp(seed=1)])
    engine = Engine(model)
    one = engine.compute_jacobian(model[0](batch(B, 4)).square().sum(1))
    two = engine.compute_jacobian(model[1](batch(B, 4)).square().sum(1))
    n = one.dense().shape[1]
    assert len(one.used) == len(two.used) == 6
    assert len(one.parameters) == 12
    assert close(Jacobian.cat([one, two]), torch.cat([one.dense(), two.dense()]))
    assert close(one + two, one.dense() + two.dense())
    assert one.dense()[:, n // 2 :].abs().sum() == 0


def test_jacobian_bytes(jacobians):
    actual, dense, _ = jacobians
    assert 0 < actual[2].nbytes < dense[2].nbytes


@pytest.mark.parametrize("materialise", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weighted_sums_equal_those_of_dense_rows(dtype, materialise):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 48), nn.Linear(48, 9)).to(dtype)
    engine = Engine(model)
    losses = model(torch.randint(9, (5, 2))).square().mean((1, 2))
    jacobian = engine.compute_jacobian(losses, materialise=materialise)
    matrix = torch.randn(3, 5, dtype=torch.float64)
    actual = jacobian.combined(matrix)
    assert len(actual) == 3
    expected = matrix @ jacobian.dense().double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    assert (actual.dense().double() - expected).norm() < tolerance * expected.norm()

"""Minimum-norm weights of dependent rows by Newton's method, compared with enumeration and with quadprog."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_jd.weighting import UPGradWeighting
from hf_jd.weighting._solvers import minimum_norm, projection
from hf_jd.weighting._solvers.projection import cone_projection
from tests.weighting.families import FAMILIES, jacobians
from tests.weighting.oracle import dot, projections, rational_gramian, update_error

MANY = 10**9


@pytest.fixture(autouse=True)
def only_newton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minimum_norm, "_FEW", 0)

    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("Newton's method ought to have settled")

    monkeypatch.setattr(minimum_norm, "nearest_point", unexpected)


def problem(m: int, rank: int, common: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    rows = random.standard_normal((m, rank)) + common
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    weights = np.abs(random.standard_normal((5, m))) * (random.random((5, m)) < 0.5)
    return rows, weights, random.random((5, m)) * (random.random((5, m)) < 0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_newton_finds_the_shortest_weights(family: str) -> None:
    for jacobian in jacobians(family):
        gramian, m = rational_gramian(jacobian), len(jacobian)
        squares = [gramian[i][i] for i in range(m)]
        for i, weights in enumerate(cone_projection(jacobian @ jacobian.T, torch.eye(m, dtype=torch.float64))):
            vertices = projections(gramian, [Fraction(int(i == j)) for j in range(m)])
            assert update_error(gramian, weights, vertices[0]) < 1e-8
            exact = [Fraction(v) for v in weights.tolist()]
            weighted = [square * v for square, v in zip(squares, exact, strict=True)]
            for vertex in vertices:
                behind = dot(weighted, [a - v for a, v in zip(vertex, exact, strict=True)])
                assert float(behind) >= -1e-8 * float(dot(weighted, exact))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("m, rank, common", [(8, 3, 0.0), (20, 19, 0.0), (30, 10, 0.5), (60, 20, 0.0), (60, 45, 0.3)])
def test_newton_and_quadprog_agree(
    m: int, rank: int, common: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, weights, offset = problem(m, rank, common, seed)
    newton = minimum_norm.smallest_solution(rows, weights, offset)
    monkeypatch.undo()
    monkeypatch.setattr(minimum_norm, "_FEW", MANY)
    quadprog = minimum_norm.smallest_solution(rows, weights, offset)
    assert (newton >= 0).all()
    np.testing.assert_allclose(newton, quadprog, rtol=0, atol=1e-11)
    np.testing.assert_allclose(newton @ rows, weights @ rows, rtol=0, atol=1e-11)
    assert np.linalg.norm(newton + offset) <= np.linalg.norm(weights + offset) * (1 + 1e-14)


def rows_in_space(m: int, rank: int, common: float) -> Tensor:
    generator = torch.Generator().manual_seed(m + rank)
    rows = torch.randn(m, rank, generator=generator, dtype=torch.float64) + common
    return rows * 10 ** torch.linspace(-3, 3, m, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("m, rank, common", [(60, 20, 0.0), (60, 20, 0.1), (60, 20, 0.4), (60, 40, 0.0), (40, 7, -0.2)])
def test_upgrad_of_low_rank_is_exact_and_follows_the_order(m: int, rank: int, common: float) -> None:
    rows = rows_in_space(m, rank, common)
    lengths = rows.norm(dim=1)
    targets = torch.eye(m, dtype=torch.float64)
    weights, violation = projection.one_by_one(rows @ rows.T, targets)
    assert violation.max() <= 1e-10
    assert (weights >= targets).all()
    order = torch.randperm(m, generator=torch.Generator().manual_seed(0))
    permuted = UPGradWeighting()(rows[order] @ rows[order].T)
    expected = (UPGradWeighting()(rows @ rows.T) * lengths)[order]
    torch.testing.assert_close(permuted * lengths[order], expected, rtol=0, atol=1e-8 * expected.max().item())


@pytest.mark.parametrize("common", [0.0, 0.15])
def test_a_dual_cone_of_zero_shows_in_one_projection(common: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_in_space(60, 15, common)
    gramian, targets = rows @ rows.T, torch.eye(60, dtype=torch.float64)
    actual, _ = projection.one_by_one(gramian, targets)
    monkeypatch.setattr(projection, "_stationary", lambda *_: None)
    expected, _ = projection.one_by_one(gramian, targets)
    lengths = rows.norm(dim=1)
    torch.testing.assert_close(
        actual * lengths / lengths[:, None], expected * lengths / lengths[:, None], rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_line_search_ends_where_the_slope_vanishes(seed: int) -> None:
    random = np.random.default_rng(seed)
    above, change = random.standard_normal(30), random.standard_normal(30)
    t = minimum_norm._line_minimum(above, change, -40.0)
    gained = (above + t * change).clip(min=0) - above.clip(min=0)
    assert t > 0
    assert gained @ change == pytest.approx(40.0, rel=1e-12)

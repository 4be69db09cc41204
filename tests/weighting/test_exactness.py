"""UPGrad, DualProj and MGDA compared with an enumeration of active sets in rational arithmetic."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from hf_jd.weighting import DualProjWeighting, MGDAWeighting, UPGradWeighting
from hf_jd.weighting._solvers.projection import cone_projection
from tests.weighting.families import FAMILIES, jacobians
from tests.weighting.oracle import dot, projections, rational_gramian, shortest_in_hull, update_error

TOLERANCE = 1e-8


def unit(i: int, m: int) -> list[Fraction]:
    return [Fraction(int(i == j)) for j in range(m)]


@pytest.mark.parametrize("family", FAMILIES)
def test_upgrad_equals_exact_projections(family: str) -> None:
    for jacobian in jacobians(family):
        gramian, m = rational_gramian(jacobian), len(jacobian)
        parts = [projections(gramian, unit(i, m))[0] for i in range(m)]
        exact = [sum(column) / m for column in zip(*parts, strict=True)]
        weights = UPGradWeighting()(jacobian @ jacobian.T)
        assert update_error(gramian, weights, exact) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_dualproj_equals_the_exact_projection(family: str) -> None:
    for jacobian in jacobians(family):
        gramian, m = rational_gramian(jacobian), len(jacobian)
        exact = projections(gramian, [Fraction(1 / m)] * m)[0]
        assert update_error(gramian, DualProjWeighting()(jacobian @ jacobian.T), exact) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_mgda_equals_the_shortest_vector(family: str) -> None:
    for jacobian in jacobians(family):
        gramian = rational_gramian(jacobian)
        weights = MGDAWeighting()(jacobian @ jacobian.T)
        assert weights.sum().item() == pytest.approx(1, abs=1e-12)
        assert update_error(gramian, weights, shortest_in_hull(gramian)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_projection_weights_have_minimum_norm(family: str) -> None:
    """v is its projection's shortest weights, in lengths of rows: along v, no vertex of their set is nearer to 0."""
    for jacobian in jacobians(family):
        gramian, m = rational_gramian(jacobian), len(jacobian)
        squares = [gramian[i][i] for i in range(m)]
        for i, weights in enumerate(cone_projection(jacobian @ jacobian.T, torch.eye(m, dtype=torch.float64)).tolist()):
            weighted = [square * Fraction(v) for square, v in zip(squares, weights, strict=True)]
            for vertex in projections(gramian, unit(i, m)):
                behind = dot(weighted, [a - Fraction(v) for a, v in zip(vertex, weights, strict=True)])
                assert float(behind) >= -1e-8 * float(dot(weighted, [Fraction(v) for v in weights]))


@pytest.mark.parametrize("weighting", [UPGradWeighting(), DualProjWeighting(), MGDAWeighting()])
@pytest.mark.parametrize("family", FAMILIES)
def test_permutation_equivariance(weighting: UPGradWeighting, family: str) -> None:
    for jacobian in jacobians(family, sizes=range(3, 9)):
        order = torch.randperm(len(jacobian), generator=torch.Generator().manual_seed(0))
        lengths = jacobian.norm(dim=1)
        weights = weighting(jacobian @ jacobian.T)
        permuted = weighting(jacobian[order] @ jacobian[order].T)
        assert difference(permuted * lengths[order], (weights * lengths)[order]) < 1e-8


@pytest.mark.parametrize("weighting", [UPGradWeighting(), DualProjWeighting(), MGDAWeighting()])
@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_all_losses_changes_no_weight(weighting: UPGradWeighting, family: str) -> None:
    for jacobian in jacobians(family, sizes=range(2, 9)):
        gramian = jacobian @ jacobian.T
        assert difference(weighting(gramian * 1e-16), weighting(gramian)) < 1e-8


def difference(first: Tensor, second: Tensor) -> float:
    return ((first - second).abs().max() / second.abs().max().clamp(min=1e-300)).item()

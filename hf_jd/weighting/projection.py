"""Projection onto the dual cone of the rows, from their Gramian alone.

The dual cone of J is {x : J x >= 0}, the directions that conflict with no row. J^T u is projected onto it as J^T v,

    v = argmin_{v >= u} v^T G v          (arXiv 2406.16232, proposition 1)

or, with v = u + z, a non-negative least squares problem in z >= 0. Its optimality conditions are z >= 0, G v >= 0 and
z^T G v = 0. Rows are scaled to unit length first, which makes every tolerance below a cosine: multiplying J by 1e-8, or
one row by 1e6, changes no decision.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hf_jd.weighting.batched import solve_nonnegative
from hf_jd.weighting.cosines import SINGULAR, Array, cosine_factor, cosine_matrix
from hf_jd.weighting.minimum_norm import smallest_solution
from hf_jd.weighting.nearest import nearest_point

_TOLERANCE = 1e-10  # largest violation of the optimality conditions, as a cosine


def cone_projection(gramian: Tensor, targets: Tensor) -> Tensor:
    """Computes the weights of the projections of J^T u onto the dual cone, for each row u of `targets`.

    Where several weights give the projection (dependent rows), those of minimum norm are given, each measured in
    lengths of its row; so the result depends on nothing but G, whatever the order of the objectives.

    Args:
        gramian: G, [m, m], float64, symmetric, any rank; zero rows are left alone.
        targets: The non-negative u, [k, m], float64.

    Returns:
        v, [k, m]: `targets` itself, exactly, where J^T u conflicts with no row.

    Raises:
        ValueError: No solver met the optimality conditions; the message has the eigenvalues of the rows' cosines.
    """
    problems, m = targets.shape
    solvers = [_one_by_one, _together]
    # Measured: one problem at a time is faster up to 32 problems of 32 rows; 80 times slower at 256 of 256.
    if problems * m * m > 32**3:
        solvers.reverse()
    weights, violation = solvers[0](gramian, targets)
    solved = violation <= _TOLERANCE
    if solved.all():
        return weights
    weights[~solved], violation[~solved] = solvers[1](gramian, targets[~solved])
    if (violation <= _TOLERANCE).all():
        return weights
    eigenvalues = torch.linalg.eigvalsh(cosine_matrix(gramian, gramian.diagonal().sqrt()))
    raise ValueError(
        f"The projection onto the dual cone did not reach the tolerance {_TOLERANCE:g} (largest violation of the "
        f"optimality conditions: {violation.max().item():g}). Is the matrix a Gramian? Scaled to a unit diagonal, its "
        f"eigenvalues are {eigenvalues.tolist()}."
    )


def _one_by_one(gramian: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    weights, violation = _project(gramian.cpu().numpy(), targets.cpu().numpy(), _solve_quadprog)
    return torch.from_numpy(weights).to(gramian), torch.from_numpy(violation).to(gramian)


def _together(gramian: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return _project(gramian, targets, _solve_batched)


def _project(gramian: Array, targets: Array, solver: Callable[[Array, Array], Array]) -> tuple[Array, Array]:
    """Scales the problems to unit rows and targets, solves those that need it, and measures the solutions.

    Arrays will do as well as tensors: for small problems they take half the time.

    Returns:
        v [k, m], and by how much each violates the optimality conditions [k], as a cosine.
    """
    weights = targets + 0
    violation = weights[:, 0] * 0
    conflicting = (targets @ gramian < 0).any(1)
    if not conflicting.any():
        return weights, violation
    lengths = gramian.diagonal() ** 0.5
    cosines = cosine_matrix(gramian, lengths)
    scaled = targets[conflicting] * lengths
    sizes = (scaled**2).sum(1)[:, None] ** 0.5
    scaled = scaled / sizes
    corrections = solver(cosines, scaled)
    slopes = (scaled + corrections) @ cosines
    # Infeasibility, and complementarity; not a number stays so, and meets no tolerance.
    faults = (abs(slopes) - slopes) / 2 + abs(slopes * corrections) / (1 + corrections.sum(1)[:, None])
    violation[conflicting] = (faults**2).sum(1) ** 0.5
    # A zero row's cosines are zero, and so is its correction: any finite divisor will do.
    weights[conflicting] += corrections * sizes / (lengths + (lengths == 0))
    return weights, violation


def _solve_batched(cosines: Tensor, targets: Tensor) -> Tensor:
    """Solves all problems together, on the device of C; a singular C, without unique solutions, is left out."""
    factor, failed = torch.linalg.cholesky_ex(cosines)
    if failed or factor.diagonal().amin().square() < SINGULAR:
        return torch.full_like(targets, torch.nan)
    return solve_nonnegative(cosines, -targets @ cosines)


def _solve_quadprog(cosines: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Solves one problem at a time by Goldfarb and Idnani's dual method.

    The problem is put to it as the projection itself, min_x |x - L^T u| with L x >= 0 and C = L L^T: it starts at L^T u
    and adds the constraints in conflict, which are few in fine-tuning, and its multipliers are z. Any factor L [m, r]
    will do, so that G need not be definite.
    """
    factor = cosine_factor(cosines)
    m, rank = factor.shape
    constraints = np.ascontiguousarray(factor.T)
    # Rounding may make a degenerate problem look infeasible, though x = 0 is feasible; a hair's breadth helps.
    bounds = [np.zeros(m), np.full(m, -1e-13), np.full(m, -1e-12)]
    corrections = np.full_like(targets, np.nan)
    for i, point in enumerate(targets @ factor):
        for bound in bounds:
            nearest = nearest_point(point, constraints, bound)
            if nearest is not None:
                break
        else:
            continue
        corrections[i] = nearest.multipliers
        if rank < m:
            tight = factor @ nearest.point <= 1e-9
            corrections[i, tight] = smallest_solution(factor[tight], corrections[i, tight], targets[i, tight])
    return corrections

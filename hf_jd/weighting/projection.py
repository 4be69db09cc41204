"""Projection onto the dual cone of the rows, from their Gramian alone.

The dual cone of J is {x : J x >= 0}, the directions that conflict with no row. J^T u is projected onto it as J^T v,

    v = argmin_{v >= u} v^T G v          (arXiv 2406.16232, proposition 1)

or, with v = u + z, a non-negative least squares problem in z >= 0. Its optimality conditions are z >= 0, G v >= 0 and
z^T G v = 0. Rows are scaled to unit length first, which makes every tolerance below a cosine: multiplying J by 1e-8, or
one row by 1e6, changes no decision.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_jd.weighting.batched import solve_nonnegative
from hf_jd.weighting.cosines import SINGULAR, cosine_factor, cosine_matrix
from hf_jd.weighting.minimum_norm import smallest_solution
from hf_jd.weighting.nearest import nearest_point

_TOLERANCE = 1e-10  # largest violation of an optimality condition, as a cosine


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
        ValueError: No solver met the optimality conditions; the message has the Gramian's eigenvalues.
    """
    lengths = gramian.diagonal().sqrt()
    conflicting = (targets @ gramian < 0).any(dim=1).nonzero()[:, 0]
    if not len(conflicting):
        return targets
    cosines = cosine_matrix(gramian, lengths)
    scaled = targets[conflicting] * lengths
    sizes = scaled.norm(dim=1, keepdim=True)
    corrections = _solve(cosines, scaled / sizes).mul_(sizes)
    # A zero row's cosines are zero, and so is its correction: any finite divisor will do.
    corrections /= torch.where(lengths > 0, lengths, 1)
    return targets.index_add(0, conflicting, corrections)


def _solve(cosines: Tensor, targets: Tensor) -> Tensor:
    """Finds the corrections z [k, m] for targets [k, m] of norm 1; each is verified, and passed on if it fails."""
    problems, m = targets.shape
    solvers = [_solve_quadprog, _solve_batched]
    # Measured: one problem at a time is faster up to 32 problems of 32 rows, by a factor of 80 slower at 256 of 256.
    if problems * m * m > 32**3:
        solvers.reverse()
    corrections = solvers[0](cosines, targets)
    violation = _violation(cosines, targets, corrections)
    if (violation <= _TOLERANCE).all():
        return corrections
    failed = violation > _TOLERANCE
    corrections[failed] = solvers[1](cosines, targets[failed])
    violation = _violation(cosines, targets, corrections)
    if (violation <= _TOLERANCE).all():
        return corrections
    raise ValueError(
        f"The projection onto the dual cone did not reach the tolerance {_TOLERANCE:g} (largest violation of the "
        f"optimality conditions: {violation.max().item():g}). Is the matrix a Gramian? Scaled to a unit diagonal, its "
        f"eigenvalues are {torch.linalg.eigvalsh(cosines).tolist()}."
    )


def _violation(cosines: Tensor, targets: Tensor, corrections: Tensor) -> Tensor:
    """Measures how far each correction is from optimal, [k]: dual infeasibility and complementarity, as cosines."""
    slopes = (targets + corrections) @ cosines
    sizes = corrections.amax(dim=1, keepdim=True).clamp_(min=1)
    violation = torch.maximum(-slopes, (slopes * corrections).abs_().div_(sizes)).amax(dim=1)
    return violation.nan_to_num_(torch.inf)


def _solve_batched(cosines: Tensor, targets: Tensor) -> Tensor:
    """Solves all problems together, on the device of C; a singular C, without unique solutions, is left out."""
    factor, failed = torch.linalg.cholesky_ex(cosines)
    if failed or factor.diagonal().amin().square() < SINGULAR:
        return torch.full_like(targets, torch.nan)
    return solve_nonnegative(cosines, -targets @ cosines)


def _solve_quadprog(cosines: Tensor, targets: Tensor) -> Tensor:
    """Solves one problem at a time by Goldfarb and Idnani's dual method.

    The problem is put to it as the projection itself, min_x |x - L^T u| with L x >= 0 and C = L L^T: it starts at L^T u
    and adds the constraints in conflict, which are few in fine-tuning, and its multipliers are z. Any factor L [m, r]
    will do, so that G need not be definite.
    """
    factor, aims = cosine_factor(cosines.cpu().numpy()), targets.cpu().numpy()
    m, rank = factor.shape
    constraints = np.ascontiguousarray(factor.T)
    # Rounding may make a degenerate problem look infeasible, though x = 0 is feasible; a hair's breadth helps.
    bounds = [np.zeros(m), np.full(m, -1e-12), np.full(m, -1e-11)]
    corrections = np.full_like(aims, np.nan)
    for i, point in enumerate(aims @ factor):
        solutions = (nearest_point(point, constraints, bound) for bound in bounds)
        nearest = next((solution for solution in solutions if solution), None)
        if nearest is None:
            continue
        corrections[i] = nearest.multipliers
        if rank < m:
            tight = factor @ nearest.point <= 1e-9
            corrections[i, tight] = smallest_solution(factor[tight], corrections[i, tight], aims[i, tight])
    return torch.from_numpy(corrections).to(cosines)

"""Projection onto the dual cone of the rows, from their Gramian alone.

The dual cone of J is {x : J x >= 0}, the directions that conflict with no row. The projection of J^T u onto it is J^T v,

    v = argmin_{v >= u} v^T G v          (arXiv 2406.16232, proposition 1)

or, with v = u + z, a non-negative least squares problem in z >= 0. Its optimality conditions are z >= 0, G v >= 0 and
z^T G v = 0. Rows are scaled to unit length first, which makes every tolerance below a cosine: multiplying J by 1e-8, or
one row by 1e6, changes no decision.
"""

from __future__ import annotations

import numpy as np
import quadprog
import torch
from torch import Tensor

from hf_jd.weighting.minimum_norm import smallest_solution

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
    cosines = cosine_matrix(gramian, lengths)
    scaled = targets * lengths
    conflicting = (scaled @ cosines < 0).any(dim=1)
    result = targets.clone()
    if not conflicting.any():
        return result
    scaled = scaled[conflicting]
    sizes = scaled.norm(dim=1, keepdim=True)
    corrections = _solve(cosines, scaled / sizes) * sizes
    # A zero row's cosines are zero, and so is its correction: any finite divisor will do.
    result[conflicting] += corrections / torch.where(lengths > 0, lengths, 1)
    return result


def cosine_matrix(gramian: Tensor, lengths: Tensor) -> Tensor:
    """Scales G [m, m] to a unit diagonal; a zero row is given the cosine 0 with every other."""
    inverse = torch.where(lengths > 0, 1 / lengths, 0)
    cosines = (gramian * inverse).mul_(inverse[:, None]).clamp_(-1, 1)
    cosines.fill_diagonal_(1)
    return cosines


def _solve(cosines: Tensor, targets: Tensor) -> Tensor:
    """Finds the corrections z [k, m] for targets [k, m] of norm 1; every solution returned is verified."""
    corrections = torch.from_numpy(_solve_quadprog(cosines.cpu().numpy(), targets.cpu().numpy())).to(cosines)
    violation = _violation(cosines, targets, corrections)
    if (violation > _TOLERANCE).any():
        raise ValueError(
            f"The projection onto the dual cone did not reach the tolerance {_TOLERANCE:g} (largest violation of the "
            f"optimality conditions: {violation.max().item():g}). Is the matrix a Gramian? Scaled to a unit diagonal, its "
            f"eigenvalues are {torch.linalg.eigvalsh(cosines).tolist()}."
        )
    return corrections


def _violation(cosines: Tensor, targets: Tensor, corrections: Tensor) -> Tensor:
    """Measures how far each correction is from optimal, [k]: dual infeasibility and complementarity, as cosines."""
    slopes = (targets + corrections) @ cosines
    complementarity = (slopes * corrections).abs() / corrections.amax(dim=1, keepdim=True).clamp(min=1)
    violation = torch.maximum((-slopes).amax(dim=1), complementarity.amax(dim=1))
    return torch.where(corrections.isfinite().all(dim=1), violation, torch.inf)


def _solve_quadprog(cosines: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Solves one problem at a time by Goldfarb and Idnani's dual method.

    The problem is put to it as the projection itself, min_x |x - L^T u| with L x >= 0 and C = L L^T: it starts at L^T u
    and adds the constraints in conflict, which are few in fine-tuning, and its multipliers are z. Any factor L [m, r] will
    do, so that G need not be definite.
    """
    factor = gramian_factor(cosines)
    m, rank = factor.shape
    identity, constraints, zero = np.eye(rank), np.ascontiguousarray(factor.T), np.zeros(m)
    points = targets @ factor
    corrections = np.empty_like(targets)
    for i, point in enumerate(points):
        try:
            solution = quadprog.solve_qp(identity, point, constraints, zero, 0, True)
        except ValueError:  # rounding made a degenerate problem look infeasible; it isn't, x = 0 is feasible
            corrections[i] = np.nan
            continue
        corrections[i] = solution[4]
        if rank < m:
            tight = factor @ solution[0] <= 1e-9
            corrections[i, tight] = smallest_solution(factor[tight], corrections[i, tight], targets[i, tight])
    return corrections


def gramian_factor(cosines: np.ndarray) -> np.ndarray:
    """Factors C = L L^T: L [m, r], r the rank of C [m, m]; eigenvalues that are rounding errors are left out."""
    try:
        factor = np.linalg.cholesky(cosines)
        if factor.diagonal().min() ** 2 > 1e-10:
            return factor
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(cosines)
    # A negative eigenvalue shows how large the errors in G are; below that, a positive one means as little.
    noise = max(-values[0], values[-1] * len(values) * np.finfo(float).eps)
    kept = values > noise
    return vectors[:, kept] * np.sqrt(values[kept])

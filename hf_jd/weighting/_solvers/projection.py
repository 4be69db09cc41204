"""Projection onto the dual cone of the rows, from their Gramian alone.

The dual cone of J is {x : J x >= 0}, the directions that conflict with no row. J^T u is projected onto it as J^T v,

    v = argmin_{v >= u} v^T G v          (arXiv 2406.16232, proposition 1)

or, with v = u + z, a non-negative least squares problem in z >= 0. Its optimality conditions are z >= 0, G v >= 0 and
z^T G v = 0. Rows are first scaled to unit length, so that every tolerance below is a cosine: multiplying J by 1e-8, or
one row by 1e6, changes no decision.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hf_jd.weighting._solvers.batched import solve_nonnegative
from hf_jd.weighting._solvers.cosines import (
    Array,
    cosine_factor,
    cosine_matrix,
    dependent,
    factored_cosines,
    independent,
    shrunk,
)
from hf_jd.weighting._solvers.duplicates import Directions
from hf_jd.weighting._solvers.minimum_norm import smallest_solution
from hf_jd.weighting._solvers.quadprog import nearest_point
from hf_jd.weighting._solvers.splitting import solve_low_rank

Solver = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_TOLERANCE = 1e-10  # largest violation of the optimality conditions, as a cosine with the projection
_LARGEST = 1e-6  # largest violation ever accepted: for rows opposite up to 1e-8, G has too few digits for more
_DIAGONAL = 2e-10  # makes G certainly definite when added; its solution violates the conditions by less than 1e-6
_ROUNDING = 1e-3  # rounding of a projection of length 0, relative to the tolerance times the sum of the terms
SMALL = 32**3  # problems times m^2 up to which one at a time is faster: `benchmark.py weightings --solvers` measures it
SMALL_DEPENDENT = 56**3  # the same for dependent rows (`--kinds "low rank"`)
_REGULARISATION = 1e-8  # the root of float64's precision: where rounding and the diagonal disturb least together
_PROXIMAL_STEPS = 2
_DEPENDENT = 1e-5  # squared pivot up to which a row may depend on others, given float32's errors
_LAST_REGULARISATION = 1e-10
_ZERO = 1e-14  # rounding error in the length of a zero projection, relative to the sum of the weights


def cone_projection(gramian: Tensor, targets: Tensor) -> Tensor:
    """Compute the weights of the projections of J^T u onto the dual cone, for each row u of `targets`.

    If several weights give the same projection (dependent rows), returns those of minimum norm, measuring each weight
    in lengths of its row: the result depends on G alone, not on the order of the objectives.

    Args:
        gramian: G, [m, m], float64, symmetric, any rank; zero rows are left alone.
        targets: The non-negative u, [k, m], float64.

    Returns:
        v, [k, m]: `targets` itself, exactly, where J^T u conflicts with no row.

    Raises:
        ValueError: G is not positive semi-definite, by more than bfloat16's rounding, or no solver met the optimality
            conditions; the message lists the eigenvalues of the rows' cosines.
    """
    weights, violation = _solve(gramian, targets)
    failed = ~(violation <= _LARGEST)
    if failed.any():  # G has too few digits to solve; the solution for a nearby Gramian meets G's tolerance
        weights[failed], violation[failed] = _solve(shrunk(gramian, _DIAGONAL), targets[failed])
    if (violation <= _LARGEST).all():
        return weights
    eigenvalues = torch.linalg.eigvalsh(cosine_matrix(gramian, gramian.diagonal().sqrt()))
    raise ValueError(
        f"The projection onto the dual cone did not reach the tolerance {_LARGEST:g} (largest violation of the "
        f"optimality conditions: {violation.max().item():g}). Is the matrix a Gramian? Scaled to a unit diagonal, its "
        f"eigenvalues are {eigenvalues.tolist()}."
    )


def _solve(gramian: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Solve with the preferred solver, failures with the other; return weights [k, m] and their violations [k]."""
    solvers = chosen_solvers(gramian, targets)
    weights, violation = solvers[0](gramian, targets)
    solved = violation <= _TOLERANCE
    if solved.all():
        return weights, violation
    others, other_violation = solvers[1](gramian, targets[~solved])
    better = violation[~solved].isnan() | (other_violation < violation[~solved])
    index = (~solved).nonzero()[:, 0][better]
    weights[index], violation[index] = others[better], other_violation[better]
    return weights, violation


def chosen_solvers(gramian: Tensor, targets: Tensor) -> tuple[Solver, Solver]:
    """Return the preferred solver, and the one for problems where it fails; a large Gramian stays on its device."""
    problems, m = targets.shape
    size = problems * m * m
    small = m <= 32 or gramian.device.type == "cpu"
    if small and problems > 1 and size > SMALL:
        small = size <= SMALL_DEPENDENT and dependent(gramian, _DEPENDENT)
    return (one_by_one, together) if small else (together, one_by_one)


def one_by_one(gramian: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Solve with quadprog, on the CPU; return the weights [k, m] and their violations of optimality [k]."""
    weights, violation = _project(gramian.cpu().numpy(), targets.cpu().numpy(), _solve_quadprog)
    return torch.from_numpy(weights).to(gramian), torch.from_numpy(violation).to(gramian)


def together(gramian: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Solve all problems at once, on the device; return the weights [k, m] and their violations of optimality [k]."""
    return _project(gramian, targets, _solve_batched)


def _project(gramian: Array, targets: Array, solver: Callable[..., Array]) -> tuple[Array, Array]:
    """Scale the problems to unit rows and targets, solve those that need it, and measure the solutions.

    Accepts numpy arrays as well as tensors: they halve the time of small problems.

    Returns:
        v [k, m], and by how much each violates the optimality conditions [k], as a cosine.
    """
    weights = targets + 0
    violation = weights[:, 0] * 0
    conflicting = (targets @ gramian < 0).any(1)
    if not conflicting.any():
        return weights, violation
    lengths = gramian.diagonal() ** 0.5
    cosines, factor = factored_cosines(gramian, lengths)
    scaled = targets[conflicting] * lengths
    sizes = (scaled**2).sum(1)[:, None] ** 0.5
    scaled = scaled / sizes
    corrections = solver(cosines, scaled, factor)
    solutions = scaled + corrections
    slopes, sums = solutions @ cosines, solutions.sum(1)
    # Infeasibility plus complementarity; NaN propagates, and meets no tolerance.
    faults = (abs(slopes) - slopes) / 2 + abs(slopes * corrections) / sums[:, None]
    violation[conflicting] = faults.sum(1) / (abs((slopes * solutions).sum(1)) ** 0.5 + _ROUNDING * sums)
    # A zero row's cosines are zero, and so is its correction: any finite divisor will do.
    weights[conflicting] += corrections * sizes / (lengths + (lengths == 0))
    return weights, violation


def _solve_batched(cosines: Tensor, targets: Tensor, factor: Tensor | None) -> Tensor:
    """Solve all problems together, on the device of C."""
    large = len(targets) * len(cosines) ** 2 > SMALL
    if factor is not None and independent(factor):
        # Where rows are dependent up to float32's errors, exchanges hardly converge.
        if large and factor.diagonal().amin() ** 2 < _DEPENDENT:
            return solve_low_rank(cosines, targets)
        return solve_nonnegative(cosines, -targets @ cosines)
    directions = Directions.of(cosines)
    if len(directions.first) == len(cosines):
        return solve_low_rank(cosines, targets) if large else _solve_singular(cosines, targets)
    cosines = cosines[directions.first][:, directions.first]
    factor, failed = torch.linalg.cholesky_ex(cosines)
    corrections = _solve_batched(cosines, directions.gather(targets), None if failed else factor)
    return directions.spread(corrections, targets)


def _solve_singular(cosines: Tensor, targets: Tensor) -> Tensor:
    """Add to the diagonal, which picks the solution of smallest |u + z| among all.

    Proximal steps undo its other effects: z <- argmin_{z >= 0} v^T C v + epsilon |v - v_last|^2.
    """
    regular = cosines.clone()
    regular.diagonal().add_(_REGULARISATION)
    right = -targets @ regular
    corrections = solve_nonnegative(regular, right, exchanges=12)
    for _ in range(_PROXIMAL_STEPS):
        settled = ~corrections[:, 0].isnan()
        moved = right + _REGULARISATION * (targets + corrections)
        corrections[settled] = solve_nonnegative(regular, moved[settled], corrections[settled], exchanges=12)
    return corrections


def _solve_quadprog(cosines: np.ndarray, targets: np.ndarray, factor: np.ndarray | None) -> np.ndarray:
    """Solve one problem at a time by Goldfarb and Idnani's dual method.

    The problem is posed as the projection itself, min_x |x - L^T u| with L x >= 0 and C = L L^T: the method starts at
    L^T u and adds violated constraints, which are few in fine-tuning, and its multipliers are z. Any factor L [m, r]
    will do, so G need not be definite.
    """
    if factor is None or not independent(factor):
        factor = cosine_factor(cosines)
    corrections = _nearest(factor, targets)
    failed = np.isnan(corrections[:, 0])
    if failed.any():
        # Rounding may make a degenerate problem look infeasible, though x = 0 is feasible; more diagonal prevents it.
        factor = np.linalg.cholesky(cosines + np.eye(len(cosines)) * _LAST_REGULARISATION)
        corrections[failed] = _nearest(factor, targets[failed])
    return corrections


def _nearest(factor: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Find the multipliers [k, m] of the projections of L^T u, L [m, r]; NaN where rounding prevents a solution."""
    if factor.shape[1] == len(factor):
        return _multipliers(factor, targets)[0]
    corrections, tight = _stationary(factor, targets) or _multipliers(factor, targets)
    for rows in np.unique(tight, axis=0):  # one factorisation serves all problems with the same tight rows
        block = np.ix_((tight == rows).all(axis=1), rows)
        corrections[block] = smallest_solution(factor[rows], corrections[block], targets[block])
    return corrections


def _stationary(factor: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Solve all problems with one projection if the dual cone is {0}; None if it isn't.

    No row's projection is longer than the projection of the rows' sum. If that one is 0, then L^T v = 0 for some
    v >= 1, and a multiple of this v solves every u.
    """
    if len(targets) == 1:
        return None
    weights = 1 + _multipliers(factor, np.ones((1, len(factor))))[0][0]
    if not np.linalg.norm(weights @ factor) <= _ZERO * weights.sum():
        return None
    weights -= factor @ np.linalg.lstsq(factor, weights, rcond=None)[0]  # removes the rounding error of L^T v = 0
    return weights * targets.max(axis=1, keepdims=True) - targets, np.ones(targets.shape, dtype=bool)


def _multipliers(factor: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project each L^T u; return the multipliers [k, m], and which rows' constraints are tight [k, m]."""
    constraints = np.ascontiguousarray(factor.T)
    bounds = np.zeros(len(factor))
    corrections = np.full_like(targets, np.nan)
    tight = np.zeros(targets.shape, dtype=bool)
    for i, point in enumerate(targets @ factor):
        nearest = nearest_point(point, constraints, bounds)
        if nearest is None:  # rounding: relax the bounds by a hair
            nearest = nearest_point(point, constraints, bounds - 1e-13)
        if nearest is not None:
            corrections[i] = nearest.multipliers
            tight[i] = factor @ nearest.point <= 1e-9
    return corrections, tight

"""Minimum-norm problems: the shortest vector in the hull of the rows (MGDA), and the smallest of equivalent weights."""

from __future__ import annotations

import numpy as np

from hf_jd.weighting._solvers.cosines import cosine_factor, independent
from hf_jd.weighting._solvers.quadprog import nearest_point

_TOLERANCE = 1e-12  # error allowed in a cosine
_PRECISION = 1e-14  # error allowed in a weight, relative to the largest one
_FEW = 64  # rows up to which quadprog is faster than Newton's method
_DAMPING = 1e-6  # keeps steps finite where fewer than r values are above their offsets
_NEWTON_STEPS = 100  # usually ten are enough


def smallest_solution(rows: np.ndarray, weights: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Find the z >= 0 of smallest |z + offset| with the same rows^T z as `weights`, for one problem [f] or for k.

    Args:
        rows: [f, r], of length about 1.
        weights: One non-negative solution, [f] or [k, f].
        offset: [f] or [k, f].

    Returns:
        z, like `weights`: `weights` itself where the rows are independent, or where rounding leaves no other solution.
    """
    if not len(rows):
        return weights
    # rows^T z = rows^T weights says the same as basis^T z = basis^T weights, with orthonormal columns.
    basis, values, _ = np.linalg.svd(rows, full_matrices=False)
    basis = basis[:, values > values[0] * len(rows) * 1e-14]
    if basis.shape[1] == len(rows):
        return weights
    if weights.ndim == 1:
        return _shortest(basis, weights, offset)
    return np.stack([_shortest(basis, z, u) for z, u in zip(weights, offset, strict=True)])


def _shortest(basis: np.ndarray, weights: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Solve one problem for z [f], by the faster method for its size; `basis` [f, r] spans the columns of the rows."""
    if len(basis) > _FEW:
        solution = _newton(basis, weights, offset)
        if solution is not None:
            return solution
    constraints = np.hstack([basis, np.eye(len(basis))])
    bounds = np.concatenate([basis.T @ weights, np.zeros(len(basis))])
    nearest = nearest_point(-offset, constraints, bounds, equalities=basis.shape[1])
    return weights if nearest is None else nearest.point.clip(min=0)


def _newton(basis: np.ndarray, weights: np.ndarray, offset: np.ndarray) -> np.ndarray | None:
    """Solve min |v|^2 subject to Q^T v = b, v >= offset, by Newton's method on its dual; Q [f, r] is orthonormal.

    v = max(offset, Q mu), where mu [r] minimises a convex function that is quadratic between kinks at (Q mu)_i =
    offset_i. With an exact line search, Newton's method reaches the exact solution in finitely many steps.
    """
    right = basis.T @ (weights + offset)
    # Entries that are rounding errors would be scaled up to steps along directions that don't matter.
    right[np.abs(right) <= _PRECISION * np.abs(weights + offset).max()] = 0
    multipliers, values = right, basis @ right
    for _ in range(_NEWTON_STEPS):
        solution = np.maximum(offset, values)
        gradient = basis.T @ solution - right
        if np.abs(gradient).max() <= _PRECISION * np.abs(solution).max():
            return solution - offset
        # Q has orthonormal columns, so leaving out the rows at their offset subtracts them from the identity.
        fixed = basis[values < offset]
        curvature = (1 + _DAMPING) * np.eye(len(right)) - fixed.T @ fixed
        step = np.linalg.solve(curvature, -gradient)
        change = basis @ step
        length = _line_minimum(values - offset, change, gradient @ step)
        multipliers = multipliers + length * step
        values = basis @ multipliers
    return None


def _line_minimum(above: np.ndarray, change: np.ndarray, slope: float) -> float:
    """Find the t >= 0 at which the slope along a line vanishes; `slope` is its value at t = 0, negative.

    The slope grows with t at a rate that is the sum of change_i^2 over all i with above_i + t change_i > 0.
    """
    # Entries that cross 0 join or leave that sum: the slope is piecewise linear, with a kink at each crossing.
    crossing = above * change < 0
    kinks = -above[crossing] / change[crossing]
    order = kinks.argsort()
    squares = change**2
    turns = (squares * np.sign(change))[crossing][order]
    active = (above > 0) | ((above == 0) & (change > 0))
    rates = squares[active].sum() + np.concatenate([[0.0], turns.cumsum()])
    starts = np.concatenate([[0.0], kinks[order]])
    # The slopes at the kinks say which piece holds the root.
    slopes = slope + np.concatenate([[0.0], (rates[:-1] * np.diff(starts)).cumsum()])
    piece = max(int(np.searchsorted(slopes, 0.0)) - 1, 0)
    return starts[piece] - slopes[piece] / rates[piece] if rates[piece] > 0 else 1.0


def minimum_norm_weights(cosines: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Find the multiples mu >= 0 of unit rows, offsets^T mu = 1, with the shortest sum: the hull's point nearest to 0.

    Args:
        cosines: The unit rows' Gramian C, [m, m].
        offsets: b in (0, 1], [m]: unit row i times 1/b_i is a vertex of the hull.

    Returns:
        mu, [m], of smallest norm if there are several solutions.
    """
    weights = _pivot(cosines, offsets)
    if weights is None:
        weights = hull_point(cosines, offsets, np.eye(1, len(offsets), int(offsets.argmax()))[0])  # the shortest vertex
    return smallest_weights(cosines, offsets, weights)


def smallest_weights(cosines: np.ndarray, offsets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the smallest of the weights that give the same shortest vector, all [m]; see `minimum_norm_weights`."""
    weights = weights.copy()
    slopes, square = cosines @ weights, weights @ cosines @ weights
    # Other weights give the same point only if the rows on its supporting hyperplane are dependent.
    tight = slopes - square * offsets <= 1e-9 * max(max(square, 0.0) ** 0.5, 1e-6)
    factor = cosine_factor(cosines[np.ix_(tight, tight)])
    if factor.shape[1] < len(factor):
        rows = np.hstack([factor, offsets[tight, None]])
        weights[tight] = smallest_solution(rows, weights[tight], np.zeros(len(rows)))
    return weights / (offsets @ weights)


def _pivot(cosines: np.ndarray, offsets: np.ndarray) -> np.ndarray | None:
    """Search for the support by exchanging all wrong rows at once; None if that doesn't settle, or is inexact.

    Up to its length, the shortest point solves C mu >= b, mu >= 0, mu^T (C mu - b) = 0.
    """
    support = np.ones(len(offsets), dtype=bool)
    for _ in range(20):
        weights = np.zeros_like(offsets)
        try:
            weights[support] = np.linalg.solve(cosines[np.ix_(support, support)], offsets[support])
        except np.linalg.LinAlgError:
            return None
        slopes = cosines @ weights - offsets
        wrong = np.where(support, weights < 0, slopes < -_TOLERANCE)
        if not wrong.any():
            exact = np.abs(slopes[support]).max() <= _TOLERANCE * np.abs(weights).max()
            return weights / (offsets @ weights) if exact and weights.max() < 1e6 else None
        support ^= wrong
        if not support.any():
            return None
    return None


def hull_point(cosines: np.ndarray, offsets: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Apply Wolfe's method ("Finding the nearest point in a polytope", 1976): exact after finitely many exchanges.

    A corral is a set of independent vertices. The point is always the shortest of a corral's hull, and gets shorter.

    Args:
        cosines: C, [m, m], as for `minimum_norm_weights`.
        offsets: b, [m].
        start: Weights of some vertices, [m]: the solution of a similar problem, or a single vertex.

    Returns:
        mu, [m], positive for the vertices of a corral only.
    """
    weights = start.copy()
    _shorten(cosines, offsets, weights, int(start.argmax()))
    best = np.inf
    for _ in range(20 * len(offsets)):
        slopes = cosines @ weights
        square = weights @ slopes
        gaps = slopes - square * offsets
        # The vertex furthest below the point's supporting hyperplane shortens the point; if none is below, stop.
        entering = int(gaps.argmin())
        noise = _TOLERANCE * max(np.abs(weights).sum() * 1e-3, max(square, 0.0) ** 0.5)
        if gaps[entering] >= -noise or weights[entering] > 0 or not square < best:
            break
        best = square
        _shorten(cosines, offsets, weights, entering)
    return weights


def _solve(system: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve A x = b [n] for a positive semi-definite A [n, n]; least squares, ten times slower, if singular."""
    try:
        if independent(np.linalg.cholesky(system)):
            return np.linalg.solve(system, right)
    except np.linalg.LinAlgError:
        pass
    return np.linalg.lstsq(system, right, rcond=None)[0]


def _shorten(cosines: np.ndarray, offsets: np.ndarray, weights: np.ndarray, entering: int) -> None:
    """Move the weights, in place, to the shortest point of a corral that includes the entering vertex."""
    support = weights > 0
    support[entering] = True
    while support.any():
        b = offsets[support]
        system = cosines[np.ix_(support, support)] + np.outer(b, b)
        # The shortest point of the support's affine hull; adding b b^T keeps the system regular if that point is 0.
        target = _solve(system, b)
        target /= b @ target
        current = weights[support]
        if (target > 0).all():
            weights[support] = target
            return
        # Move towards the target until the first weight vanishes, and drop its vertex.
        falling = target <= 0
        fractions = np.full(len(b), np.inf)
        fractions[falling] = current[falling] / (current[falling] - target[falling]).clip(min=1e-300)
        moved = current + min(1.0, fractions.min()) * (target - current)
        moved[fractions == fractions.min()] = 0
        weights[support] = moved.clip(min=0)
        support &= weights > 0
        weights[~support] = 0

"""CAGrad: the best update near the mean for the worst-off objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_jd.weighting._solvers.cosines import SINGULAR, cosine_matrix
from hf_jd.weighting._solvers.minimum_norm import hull_point, smallest_weights
from hf_jd.weighting.base import Names
from hf_jd.weighting.preference import PreferenceWeighting

_EXCHANGES = 30
_TOLERANCE = 1e-12
_STATIONARY = 1e-7  # |g_w| / sum_i w_i |g_i| below which the rows cancel as far as float64 can tell


@dataclass(frozen=True)
class CAGradWeighting(PreferenceWeighting):
    """Conflict-averse gradient descent, solved exactly.

    The update maximises min_i <g_i, d> among all d with |d - g_0| <= c |g_0|, where g_0 = J^T p is the mean row. In
    terms of weights, d = g_0 + c |g_0| g_w / |g_w|, where g_w = J^T w, and w on the simplex minimises
    <g_w, g_0> + c |g_0| |g_w|. If g_w = 0 is best, the step is Pareto stationary and the weights are 0.

    Attributes:
        c: The radius, 0 or more; 0 gives the mean; from 1 on, the update conflicts with no row.

    References:
        Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", arXiv 2110.14048, equation 3 and
        algorithm 1.
    """

    guarantee: ClassVar[str] = "most progress for the worst objective within c of the mean; non-conflicting for c ≥ 1"
    cost: ClassVar[str] = "a few times m³"

    pref_vector: Sequence[float] | Tensor | None = field(default=None, kw_only=True)
    c: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.c >= 0:
            raise ValueError(f"c is {self.c}; give 0 or more.")

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Compute p + c |g_0| / |g_w| w, [m]."""
        preference = self.preference(gramian)
        lengths = gramian.diagonal().sqrt()
        scale = lengths.max()
        if not scale or not self.c:
            return preference
        # No update helps or hurts the objective of a zero row: the other rows decide.
        present = lengths > 0
        lengths, rows = lengths[present], gramian[present][:, present]
        # From here on, rows are written as multiples of unit rows, with the longest row as the unit of length.
        cosines = cosine_matrix(rows, lengths)
        multiples = preference[present] * lengths / scale
        slopes = cosines @ multiples
        mean_length = (multiples @ slopes).clamp(min=0).sqrt()
        if mean_length <= _TOLERANCE * multiples.sum():
            return preference
        offsets = (lengths.min() / lengths).cpu().numpy()
        mixture = _worst_mixture(cosines.cpu().numpy(), offsets, (slopes / mean_length).cpu().numpy(), self.c)
        if mixture is None:
            return torch.zeros_like(preference)
        correction = gramian.new_tensor(mixture) * self.c * mean_length * scale / lengths
        return preference.masked_scatter(present, preference[present] + correction)


def _worst_mixture(cosines: np.ndarray, offsets: np.ndarray, slopes: np.ndarray, radius: float) -> np.ndarray | None:
    """Find the unit vector g_w / |g_w| of the w that minimises <g_w, g_0> + radius |g_w|, where |g_0| = 1.

    Args:
        cosines: C, [m, m], of the unit rows.
        offsets: o, [m]: multiples mu of the unit rows are on the simplex if o^T mu = 1.
        slopes: b, [m]: products of the unit rows with g_0.
        radius: c.

    Returns:
        t >= 0, [m], multiples of the unit rows; None where the best g_w is 0.
    """
    support = np.ones(len(offsets), dtype=bool)
    for _ in range(_EXCHANGES):
        multiples = np.zeros_like(offsets)
        value = _stationary(cosines, offsets, slopes, radius, support, multiples)
        if value is None:
            break
        gaps = slopes + radius * (cosines @ multiples) - value * offsets
        wrong = np.where(support, multiples < 0, gaps < -_TOLERANCE)
        if not wrong.any():
            if abs(multiples @ cosines @ multiples - 1) > 1e-9 or multiples.sum() > 1 / _STATIONARY:
                break
            return multiples
        support ^= wrong
    return _bisect(cosines, offsets, slopes, radius)


def _stationary(
    cosines: np.ndarray, o: np.ndarray, b: np.ndarray, radius: float, support: np.ndarray, multiples: np.ndarray
) -> float | None:
    """Solve b + radius C t = v o, t^T C t = 1 on the support, for t (into `multiples`) and v, the minimum."""
    system = cosines[np.ix_(support, support)]
    try:
        factor = np.linalg.cholesky(system)
    except np.linalg.LinAlgError:
        return None
    if not len(factor) or factor.diagonal().min() ** 2 < SINGULAR:
        return None
    a, q = np.linalg.solve(system, np.stack([o[support], b[support]], axis=1)).T
    # With t = (v a - q) / radius, t^T C t = 1 is a quadratic equation for v. Its larger root has o^T t > 0.
    square, cross, free = o[support] @ a, o[support] @ q, b[support] @ q - radius**2
    # If the support is too large, there may be no root: the vertex of the parabola then shows which rows to drop.
    value = (cross + max(cross**2 - square * free, 0.0) ** 0.5) / square
    multiples[support] = (value * a - q) / radius
    return value


def _bisect(cosines: np.ndarray, offsets: np.ndarray, slopes: np.ndarray, radius: float) -> np.ndarray | None:
    """Find the same vector for dependent rows, by a search for beta = |g_w| / c.

    g_w + beta g_0 is the shortest vector in the hull of the g_i + beta g_0. The support of its weights gives the next
    beta, exactly if it is the right support; where it gives none between the bounds, they are bisected.
    """
    cross = np.outer(offsets, slopes)
    cross, square = cross + cross.T, np.outer(offsets, offsets)
    low, high = 1e-12, 2 / (radius * offsets.min())
    beta, weights = min(1 / radius, high), np.eye(1, len(offsets), int(offsets.argmax()))[0]
    for step in count():  # from above: supports are small there, and grow
        shifted = cosines + beta * cross + beta**2 * square
        shifted /= shifted.diagonal().max()
        weights = hull_point(shifted, offsets, weights)
        length = max(weights @ cosines @ weights, 0.0) ** 0.5
        if abs(length - radius * beta) <= _TOLERANCE * length or high / low <= 1 + 1e-14:
            break
        low, high = (low, beta) if length < radius * beta else (beta, high)
        multiples = np.zeros_like(offsets)
        _stationary(cosines, offsets, slopes, radius, weights > 0, multiples)
        total = radius * (offsets @ multiples)
        inside = step < _EXCHANGES and low * total < 1 < high * total  # rounding may keep a guess from settling
        beta = 1 / total if inside else (low * high) ** 0.5
    weights = smallest_weights(shifted, offsets, weights)
    length = max(weights @ cosines @ weights, 0.0) ** 0.5
    return weights / length if length > _STATIONARY * weights.sum() else None

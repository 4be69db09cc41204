"""Solve many non-negative least squares problems with one matrix, given nearly right guesses of their supports.

Supports that have most rows in common share one factorisation: C is pivoted on a support near the others, and what is
left of each problem is a system in the rows by which its support differs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_EXCHANGES = 6
_FEW = 1 / 64  # share of wrong rows up to which exchanges are tried
_TOGETHER = 64  # problems whose systems are in memory at once
_REFINEMENTS = 20
_PRECISION = 1e-13
_SIGN = 1e-11  # smallest value, relative to the sum of the weights, that is certainly no rounding error
_REGULARISATION = 1e-11  # added to the diagonal of C, which makes it definite


class Problems(NamedTuple):
    """The problems: z >= 0 with s = C (u + z) >= 0 and s^T z = 0, for each u.

    Attributes:
        cosines: C, [m, m], positive semi-definite, of unit diagonal.
        targets: u, [k, m], 0 or more.
    """

    cosines: Tensor
    targets: Tensor

    def select(self, index: Tensor) -> Problems:
        return self._replace(targets=self.targets[index])


class Pivoted(NamedTuple):
    """C pivoted on a support, [m, m]: it maps s there and z elsewhere to z there and s elsewhere, if u = 0."""

    matrix: Tensor
    support: Tensor

    @classmethod
    def on(cls, support: Tensor, problems: Problems) -> Pivoted:
        """Pivot C on the support [m]."""
        matrix = problems.cosines.clone()
        matrix.diagonal().add_(_REGULARISATION)
        rows = support.nonzero()[:, 0]
        factor, _ = torch.linalg.cholesky_ex(matrix[rows][:, rows])
        inverse = torch.cholesky_inverse(factor)
        ratios = inverse @ matrix[rows]
        matrix -= matrix[:, rows] @ ratios
        matrix[rows], matrix[:, rows] = -ratios, ratios.T
        matrix[rows[:, None], rows] = inverse
        return cls(matrix, support)


def exchange(problems: Problems, pivoted: Pivoted, positive: Tensor) -> Tensor:
    """Solve for z on the supports [k, m], exchanging wrong rows while they are few.

    Returns:
        z, [k, m]; NaN for problems of many wrong rows.
    """
    solution = torch.full_like(problems.targets, torch.nan)
    order = (positive ^ pivoted.support).sum(dim=1).argsort()  # systems of similar size need little padding
    for left in order.split(_TOGETHER):
        guess = positive[left]
        for _ in range(_EXCHANGES):
            some, systems = problems.select(left), _Systems.of(pivoted, guess)
            wrong = systems.wrong_rows(some)
            likely = ~wrong.any(dim=1)
            solution[left[likely]], wrong[likely] = systems.select(likely).refined_solution(some.select(likely))
            count = wrong.sum(dim=1)
            solution[left[count > 0]] = torch.nan
            few = (count > 0) & (count <= max(1, _FEW * guess.shape[1]))
            left, guess = left[few], (guess ^ wrong)[few]
            if not len(left):
                break
    return solution


class _Systems(NamedTuple):
    """The factored systems of n rows or fewer by which k supports differ from the one that C is pivoted on.

    Attributes:
        pivoted: C, pivoted.
        positive: The supports, [k, m].
        rows: By which they differ, [k, n], padded with any others.
        used: Which are not padding, [k, n].
        factors: LU factors of the systems, padded with the identity, [k, n, n].
        pivots: Their pivots, [k, n].
    """

    pivoted: Pivoted
    positive: Tensor
    rows: Tensor
    used: Tensor
    factors: Tensor
    pivots: Tensor

    @classmethod
    def of(cls, pivoted: Pivoted, positive: Tensor) -> _Systems:
        differs = positive ^ pivoted.support
        size = max(1, int(differs.sum(dim=1).max()))
        chosen, rows = differs.to(torch.int8).topk(size, dim=1)
        used = chosen.bool()
        systems = pivoted.matrix.take(rows[:, :, None] * positive.shape[1] + rows[:, None, :])
        systems *= used[:, None, :]
        systems.diagonal(dim1=1, dim2=2).masked_fill_(~used, 1)
        factors, pivots, _ = torch.linalg.lu_factor_ex(systems)
        return cls(pivoted, positive, rows, used, factors, pivots)

    def select(self, index: Tensor) -> _Systems:
        return _Systems(self.pivoted, *(values[index] for values in self[1:]))

    def solve(self, slopes: Tensor) -> Tensor:
        """Solve s = C z + `slopes`, with s = 0 on the supports and z = 0 elsewhere; return z + s, [k, m]."""
        matrix, support = self.pivoted
        inside = slopes * support
        offset = slopes - inside - inside @ matrix.T  # z and s if the support were the pivoted one
        right = -offset.gather(1, self.rows) * self.used
        differing = torch.linalg.lu_solve(self.factors, self.pivots, right[:, :, None])[:, :, 0]
        exchanged = torch.zeros_like(offset).scatter_add_(1, self.rows, differing * self.used)
        return torch.where(self.positive ^ support, exchanged, offset + exchanged @ matrix.T)

    def wrong_rows(self, problems: Problems) -> Tensor:
        """Return the rows that prove the supports wrong, [k, m]."""
        fixed = problems.targets * ~self.positive
        values = self.solve(fixed @ problems.cosines)
        return _negative(values - problems.targets * self.positive, fixed + values * self.positive, _SIGN)

    def refined_solution(self, problems: Problems) -> tuple[Tensor, Tensor]:
        """Refine the solutions, which undoes the regularisation, until rounding prevents it.

        Returns:
            z, and the rows that prove the supports wrong, [k, m] each.
        """
        cosines, targets = problems
        weights = targets * ~self.positive
        slopes, last = weights @ cosines, torch.full_like(weights[:, :1], torch.inf)
        for _ in range(_REFINEMENTS):
            change = self.solve(slopes * self.positive) * self.positive
            # The smallest v has no component in C's null space; rounding errors there grow by 1 / regularisation.
            change += _REGULARISATION * self.solve(change) * self.positive
            size = change.abs().amax(dim=1, keepdim=True)
            better = size < last / 2
            weights += change * better
            slopes = weights @ cosines
            # Sizes fall at a steady rate: stop if the next one is a rounding error.
            missing = last.isinf() | (size / last * size > _PRECISION * weights.amax(dim=1, keepdim=True))
            if not (better & missing).any():
                break
            last = torch.where(better, size, 0)
        corrections = (weights - targets) * self.positive
        return corrections.clamp(min=0), _negative(torch.where(self.positive, corrections, slopes), weights, _PRECISION)


def _negative(values: Tensor, weights: Tensor, tolerance: float) -> Tensor:
    return ~(values >= -tolerance * weights.abs().sum(dim=1, keepdim=True))

"""IMTL-G: an update with equal projections onto all rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_jd.weighting._solvers.cosines import SINGULAR, solve_semidefinite
from hf_jd.weighting.base import Names
from hf_jd.weighting.preference import PreferenceWeighting


@dataclass(frozen=True)
class IMTLGWeighting(PreferenceWeighting):
    """The gradient balance of impartial multi-task learning.

    The update has the same projection onto every row's direction, and its weights sum to 1: w = v / sum(v), with
    v = G^+ n and n_i = |g_i|. Weights may be negative; where sum(v) is negative, the update goes against every row, by
    definition. Where sum(v) is zero, there is no such update, and w = 0.

    Attributes:
        pref_vector: p: the projections are proportional to it, n_i = p_i |g_i|. None makes them equal.

    References:
        Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, equation 6; for dependent rows, as in arXiv
        2406.16232, section 5.
    """

    guarantee: ClassVar[str] = "equal projections on all rows"
    cost: ClassVar[str] = "m³"

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Compute w = v / sum(v), v = G^+ (p * sqrt(diag G)), [m]."""
        lengths = gramian.diagonal().sqrt()
        preference = self.preference(gramian)
        inverse = 1 / lengths
        factor, failed = torch.linalg.cholesky_ex(gramian * inverse * inverse[:, None])
        if not failed and factor.diagonal().amin().square() >= SINGULAR:  # exact for rows of very different lengths
            solution = torch.cholesky_solve(preference[:, None], factor)[:, 0] * inverse
        else:
            solution = solve_semidefinite(gramian, preference * lengths)
        total = solution.sum()
        meaningful = total.abs() > solution.abs().sum() * len(solution) * torch.finfo(torch.float64).eps
        return torch.where(meaningful, solution / total, 0)

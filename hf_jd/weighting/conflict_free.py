"""ConFIG: an update with the same cosine to every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_jd.weighting._solvers.cosines import cosine_matrix, divide, solve_semidefinite
from hf_jd.weighting.base import Names
from hf_jd.weighting.preference import PreferenceWeighting


@dataclass(frozen=True)
class ConFIGWeighting(PreferenceWeighting):
    """Conflict-free inverse gradients.

    The update's direction has the same cosine with every row, u = U^+ 1 with U the unit rows, and its length is the sum
    of the rows' projections onto it: d = (sum_i <g_i, u>) u / |u|^2. Zero rows are ignored. If the rows are
    independent, the update conflicts with none.

    Attributes:
        pref_vector: The cosines are proportional to it. None makes them equal.

    References:
        Liu et al., "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", arXiv 2408.11104,
        equations 2 and 3.
    """

    guarantee: ClassVar[str] = "equal cosines with all rows; non-conflicting for independent rows"
    cost: ClassVar[str] = "m³"

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Compute w_i = (sum_j |g_j| (C v)_j) / (v^T C v) v_i / |g_i|, v = C^+ p, C the rows' cosines, [m]."""
        lengths = gramian.diagonal().sqrt()
        cosines = cosine_matrix(gramian, lengths)
        wanted = self.preference(gramian) * len(gramian) * (lengths > 0)
        solution = solve_semidefinite(cosines, wanted)
        reached = cosines @ solution
        square = solution @ reached
        # Where no direction is closer to the rows than to their opposites, u is nothing but rounding error.
        meaningful = (reached.norm() > 1e-12 * wanted.norm()) & (square > 0)
        return torch.where(meaningful, divide(solution, lengths) * (lengths @ reached / square), 0)

"""UPGrad: the mean of the rows' projections onto the dual cone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_jd.weighting._solvers.projection import cone_projection
from hf_jd.weighting.base import Names
from hf_jd.weighting.preference import PreferenceWeighting


@dataclass(frozen=True)
class UPGradWeighting(PreferenceWeighting):
    """Unconflicting projection of gradients.

    The update is sum_i p_i pi_J(g_i), where pi_J projects onto the dual cone {x : J x >= 0} of the rows g_1, ..., g_m:
    every projection, and so the update, conflicts with no row. If no two rows conflict, the update is J^T p, the mean.

    Guarantees: non-conflicting; linear under scaling (the update is linear in the positive scale of each row); the
    update lies in the span of the rows.

    References:
        Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232, equation 4 and
        proposition 1.
    """

    guarantee: ClassVar[str] = "non-conflicting; linear under scaling; the mean without conflict"
    cost: ClassVar[str] = "m problems, m² to m³ each"

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Compute w = sum_i p_i argmin_{v >= e_i} v^T G v, [m]."""
        return cone_projection(gramian, self.preference(gramian).diag()).sum(dim=0)

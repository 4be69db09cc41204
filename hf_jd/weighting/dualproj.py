"""DualProj: the projection of the mean row onto the dual cone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_jd.weighting._solvers.projection import cone_projection
from hf_jd.weighting.base import Names
from hf_jd.weighting.preference import PreferenceWeighting


@dataclass(frozen=True)
class DualProjWeighting(PreferenceWeighting):
    """Projects J^T p, the mean row, onto the dual cone {x : J x >= 0} of the rows.

    The update is the vector nearest to the mean row that conflicts with no row; if the mean itself conflicts with none,
    it is the mean. Unlike with UPGrad, a long row can dominate the update.

    References:
        Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", arXiv 1706.08840, equation 11; named
        DualProj in arXiv 2406.16232, section 5.
    """

    guarantee: ClassVar[str] = "non-conflicting; nearest to the mean; the mean without conflict"
    cost: ClassVar[str] = "one problem, m² to m³"

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Compute w = argmin_{v >= p} v^T G v, [m]."""
        return cone_projection(gramian, self.preference(gramian)[None])[0]

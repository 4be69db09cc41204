"""FairGrad: alpha-fair progress of all objectives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_jd.weighting._solvers.fairness import fair_weights
from hf_jd.weighting.base import Names, Weighting


@dataclass(frozen=True)
class FairGradWeighting(Weighting):
    """Fair resource allocation: the update maximises sum_i u(<g_i, d>), u(x) = x^(1 - alpha) / (1 - alpha).

    Every objective makes progress <g_i, d> = w_i^(-1/alpha) > 0. Where no update makes progress on all, w = 0.

    Attributes:
        alpha: The degree of fairness: 0 gives the mean, 1 proportional fairness (Nash-MTL's weights), 2 minimum
            potential delay. Towards infinity, only the worst-off objective counts.

    References:
        Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", arXiv 2402.15638, equation 4.
    """

    guarantee: ClassVar[str] = "every row makes progress, or w = 0"
    cost: ClassVar[str] = "ten times m³"

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; give a finite number of 0 or more.")

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Solve G w = w^(-1/alpha), [m]."""
        if self.alpha == 0:
            return gramian.new_full((len(gramian),), 1 / len(gramian))
        return fair_weights(gramian, self.alpha)

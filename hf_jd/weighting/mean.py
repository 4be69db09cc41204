"""The mean of the objectives: gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_jd.weighting.base import Names, Weighting


@dataclass(frozen=True)
class MeanWeighting(Weighting):
    """w_i = 1/m: the update is the mean of the rows, as in the stock trainer."""

    guarantee: ClassVar[str] = "the stock step"
    cost: ClassVar[str] = "m"

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Return 1/m, [m]."""
        return gramian.new_full((len(gramian),), 1 / len(gramian))

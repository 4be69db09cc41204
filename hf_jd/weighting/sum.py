"""The sum of the objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_jd.weighting.base import Names, Weighting


@dataclass(frozen=True)
class SumWeighting(Weighting):
    """w_i = 1: the update is the sum of the rows."""

    guarantee: ClassVar[str] = "m times the stock step"
    cost: ClassVar[str] = "m"

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Return ones, [m]."""
        return gramian.new_ones(len(gramian))

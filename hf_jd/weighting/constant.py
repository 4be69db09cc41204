"""Constant weights, set by the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_jd.weighting.base import Names, Weighting
from hf_jd.weighting.preference import checked_numbers, per_objective


@dataclass(frozen=True)
class ConstantWeighting(Weighting):
    """w is the same at every step: linear scalarization.

    Attributes:
        weights: w, [m], non-negative and not all zero (stored as a tuple of floats).
    """

    guarantee: ClassVar[str] = "none"
    cost: ClassVar[str] = "m"

    weights: Sequence[float] | Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", checked_numbers("weights", self.weights))

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Return the weights, [m]."""
        return per_objective("weights", self.weights, gramian, 1.0)

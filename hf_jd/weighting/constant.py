"""Weights that the user sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_jd.weighting.base import Names, Weighting
from hf_jd.weighting.preference import checked_numbers


@dataclass(frozen=True)
class ConstantWeighting(Weighting):
    """w is the same at every step: linear scalarization.

    Attributes:
        weights: The w, [m], non-negative and not all zero (kept as a tuple of floats).
    """

    weights: Sequence[float] | Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", checked_numbers("weights", self.weights))

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Returns the weights, [m]."""
        if len(self.weights) != len(gramian):
            raise ValueError(f"weights has {len(self.weights)} entries, but this step has {len(gramian)} objectives.")
        return torch.as_tensor(self.weights, dtype=gramian.dtype, device=gramian.device)

"""STCH: weights of a smooth maximum of the losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_jd.weighting.base import LossWeighting, Names
from hf_jd.weighting.preference import checked_numbers, per_objective


@dataclass(frozen=True)
class STCHWeighting(LossWeighting):
    """Smooth Tchebycheff scalarization: the gradient of mu log sum_i exp(p_i (L_i - z_i) / mu).

    w_i = p_i softmax(p (L - z) / mu)_i. As mu goes to 0, only the largest p_i (L_i - z_i) counts.

    Attributes:
        mu: The smoothing, positive, in units of the losses.
        weights: p, [m], non-negative and not all zero; None for 1/m each.
        reference: z, the ideal losses, [m]; None for 0.

    References:
        Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", arXiv 2402.19078, equation 9.
    """

    guarantee: ClassVar[str] = "follows the largest loss as mu goes to 0"
    cost: ClassVar[str] = "m"

    mu: float = 0.1
    weights: Sequence[float] | Tensor | None = None
    reference: Sequence[float] | Tensor | None = None

    def __post_init__(self) -> None:
        if not self.mu > 0:
            raise ValueError(f"mu is {self.mu}; give a positive number.")
        if self.weights is not None:
            object.__setattr__(self, "weights", checked_numbers("weights", self.weights))
        if self.reference is not None:
            object.__setattr__(self, "reference", tuple(float(z) for z in self.reference))

    def weigh(self, losses: Tensor, names: Names, /) -> Tensor:
        """Compute w = p softmax(p (L - z) / mu), [m]."""
        preference = per_objective("weights", self.weights, losses, 1 / len(losses))
        ideal = per_objective("reference", self.reference, losses, 0.0)
        return preference * (preference * (losses - ideal) / self.mu).softmax(dim=0)

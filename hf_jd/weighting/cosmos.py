"""COSMOS: a weighted sum of the losses, minus their cosine with the preferences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_jd.weighting.base import LossWeighting, Names
from hf_jd.weighting.preference import checked_numbers, per_objective


@dataclass(frozen=True)
class COSMOSWeighting(LossWeighting):
    """The gradient of r^T L - lambda cos(r, L), which pulls the losses towards the ray of the preference r.

    w = r - lambda (r / |r| - cos(r, L) L / |L|) / |L|; a loss far above the ray gains weight, one below it may be
    driven up. The paper samples r at each step and feeds it to the model; here r is constant.

    Attributes:
        lambda_: lambda, the weight of the direction, 0 or more; the paper uses 0.01 to 8.
        weights: r, [m], non-negative and not all zero; None for 1/m each.

    References:
        Ruchte and Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective Learning", arXiv 2103.13392,
        equation 5.
    """

    guarantee: ClassVar[str] = "none"
    cost: ClassVar[str] = "m"

    lambda_: float = 1.0
    weights: Sequence[float] | Tensor | None = None

    def __post_init__(self) -> None:
        if not self.lambda_ >= 0:
            raise ValueError(f"lambda_ is {self.lambda_}; give 0 or more.")
        if self.weights is not None:
            object.__setattr__(self, "weights", checked_numbers("weights", self.weights))

    def weigh(self, losses: Tensor, names: Names, /) -> Tensor:
        """Compute r - lambda d cos(r, L) / dL, [m]."""
        preference = per_objective("weights", self.weights, losses, 1 / len(losses))
        length = losses.norm()
        if not length:
            return preference
        ray, direction = preference / preference.norm(), losses / length
        return preference - self.lambda_ / length * (ray - (ray @ direction) * direction)

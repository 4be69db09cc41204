"""PBI: weights that lower the losses along a ray, and their distance from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_jd.weighting.base import LossWeighting, Names
from hf_jd.weighting.preference import checked_numbers, per_objective


@dataclass(frozen=True)
class PBIWeighting(LossWeighting):
    """Penalty-based boundary intersection: the gradient of d1 + theta d2.

    d1 = <L - z, r> / |r| is how far the losses are along the ray of the preference r, d2 = |L - z - d1 r / |r|| their
    distance from it. w = r / |r| + theta (L - z - d1 r / |r|) / d2. The second term has constant length, so the losses
    never settle on the ray; a loss below it is driven up.

    Attributes:
        theta: The weight of the distance, 0 or more.
        weights: r, [m], non-negative and not all zero; None for equal ones.
        reference: z, the ideal losses, [m]; None for 0.

    References:
        Zhang and Li, "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition", IEEE Transactions on
        Evolutionary Computation 11 (2007), section II.C.
    """

    guarantee: ClassVar[str] = "none"
    cost: ClassVar[str] = "m"

    theta: float = 5.0
    weights: Sequence[float] | Tensor | None = None
    reference: Sequence[float] | Tensor | None = None

    def __post_init__(self) -> None:
        if not self.theta >= 0:
            raise ValueError(f"theta is {self.theta}; give 0 or more.")
        if self.weights is not None:
            object.__setattr__(self, "weights", checked_numbers("weights", self.weights))
        if self.reference is not None:
            object.__setattr__(self, "reference", tuple(float(z) for z in self.reference))

    def weigh(self, losses: Tensor, names: Names, /) -> Tensor:
        """Compute r / |r| + theta (L - z - d1 r / |r|) / d2, [m]; without the second term on the ray."""
        ray = per_objective("weights", self.weights, losses, 1.0)
        ray = ray / ray.norm()
        above = losses - per_objective("reference", self.reference, losses, 0.0)
        aside = above - (above @ ray) * ray
        distance = aside.norm()
        on_the_ray = distance <= len(losses) * torch.finfo(losses.dtype).eps * above.norm()
        return ray if on_the_ray else ray + self.theta * aside / distance

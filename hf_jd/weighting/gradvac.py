"""GradVac: brings each pair of rows to its usual cosine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_jd.weighting.base import Names
from hf_jd.weighting.pcgrad import visits
from hf_jd.weighting.stateful import Stateful

_LARGEST_TARGET = 1 - 1e-9  # a cosine: a row can't be made parallel to another by adding a finite multiple of it


@dataclass(frozen=True)
class GradVacWeighting(Stateful):
    """Gradient vaccine: adds multiples of other rows to each row, to bring their cosines up to moving averages.

    Row i visits the others in random order. If its cosine phi with row j is below the target, which is the moving
    average of this pair's cosines, a multiple of g_j is added to row i, which brings the cosine to the target:

        |g_i| (target sqrt(1 - phi^2) - phi sqrt(1 - target^2)) / (|g_j| sqrt(1 - target^2))

    Then the target moves: target <- (1 - beta) target + beta phi. The update is the sum of the changed rows.

    Attributes:
        beta: How fast the targets, which start at 0, follow the cosines, in [0, 1]. With 0 the method is PCGrad.
        seed: The seed of the weighting's generator, which draws the orders.

    References:
        Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual
        Models", arXiv 2010.05874, algorithm 1, equations 3 and 4.
    """

    guarantee: ClassVar[str] = "none for one step"
    cost: ClassVar[str] = "m³"

    beta: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is {self.beta}; give a number in [0, 1].")

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Compute w = sum_i c_i, c_i the coefficients of the changed row i, [m]."""
        m = len(gramian)
        lengths = gramian.diagonal().sqrt()
        targets = self.memory.read("targets", names, gramian, dims=2)
        coefficients = torch.eye(m, dtype=gramian.dtype, device=gramian.device)
        products = gramian.clone()  # of the changed row i with row j
        for visited in visits(m, self.memory.generator).to(gramian.device):
            column = visited[:, None]
            norms = (coefficients * products).sum(dim=1).clamp(min=0).sqrt()  # of the changed rows
            scale = norms * lengths[visited]
            cosine = torch.where(scale > 0, products.gather(1, column)[:, 0] / scale, 0).clamp(-1, 1)
            target = targets.gather(1, column)[:, 0]
            reachable = target.clamp(max=_LARGEST_TARGET)
            sine, wanted = (1 - cosine.square()).sqrt(), (1 - reachable.square()).sqrt()
            step = norms * (reachable * sine - cosine * wanted) / (lengths[visited] * wanted)
            step = torch.where((cosine < reachable) & (scale > 0), step, 0)
            coefficients.scatter_add_(1, column, step[:, None])
            products += step[:, None] * gramian[visited]
            targets.scatter_(1, column, ((1 - self.beta) * target + self.beta * cosine)[:, None])
        self.memory.write("targets", names, targets)
        return coefficients.sum(dim=0)

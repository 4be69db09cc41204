"""PCGrad: removes each row's conflicts with the others, one after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_jd.weighting.base import Names
from hf_jd.weighting.stateful import Stateful


@dataclass(frozen=True)
class PCGradWeighting(Stateful):
    """Projecting conflicting gradients.

    Each row visits the others in random order, and wherever it conflicts with one, its component along that row is
    removed. The update is the sum of the changed rows; for m > 2 it may still conflict with the original rows.

    Attributes:
        seed: The seed of the weighting's generator, which draws the orders.

    References:
        Yu et al., "Gradient Surgery for Multi-Task Learning", arXiv 2001.06782, algorithm 1.
    """

    guarantee: ClassVar[str] = "non-conflicting for m = 2 only"
    cost: ClassVar[str] = "m³"

    seed: int = 0

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Compute w = sum_i c_i, c_i the coefficients of the changed row i, [m]."""
        m = len(gramian)
        squares = gramian.diagonal()
        coefficients = torch.eye(m, dtype=gramian.dtype, device=gramian.device)
        products = gramian.clone()  # of the changed row i with row j
        for visited in visits(m, self.memory.generator).to(gramian.device):
            product = products.gather(1, visited[:, None])[:, 0]
            # A conflict with a zero row is a rounding error.
            step = torch.where((product < 0) & (squares[visited] > 0), -product / squares[visited], 0)
            coefficients.scatter_add_(1, visited[:, None], step[:, None])
            products += step[:, None] * gramian[visited]
        return coefficients.sum(dim=0)


def visits(m: int, generator: torch.Generator) -> Tensor:
    """Draw a random order of the others for each of m rows; entry [t, i] is the row that row i visits at time t."""
    orders = torch.stack([torch.randperm(m - 1, generator=generator) for _ in range(m)])
    return (orders + (orders >= torch.arange(m)[:, None])).mT

"""Random weights: a baseline for all other methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_jd.weighting.base import Names
from hf_jd.weighting.stateful import Memory, Stateful, StatefulLoss


@dataclass(frozen=True)
class RandomWeighting(Stateful):
    """w = softmax of m standard normal numbers, redrawn at each step.

    Attributes:
        seed: The seed of the weighting's generator.

    References:
        Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning", arXiv
        2111.10603, algorithm 2.
    """

    guarantee: ClassVar[str] = "none"
    cost: ClassVar[str] = "m"

    seed: int = 0

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Draw the weights, [m]."""
        return _draw(self.memory, gramian)


@dataclass(frozen=True)
class RLWWeighting(StatefulLoss):
    """Random loss weighting: the same weights as `RandomWeighting`, without the cost of a Gramian.

    Attributes:
        seed: The seed of the weighting's generator.

    References:
        Lin et al., arXiv 2111.10603, algorithm 1.
    """

    guarantee: ClassVar[str] = "none"
    cost: ClassVar[str] = "m"

    seed: int = 0

    def weigh(self, losses: Tensor, names: Names, /) -> Tensor:
        """Draw the weights, [m]."""
        return _draw(self.memory, losses)


def _draw(memory: Memory, like: Tensor) -> Tensor:
    return torch.randn(len(like), generator=memory.generator, dtype=torch.float64).softmax(dim=0).to(like.device)

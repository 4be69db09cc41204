"""Nash-MTL: the weights of the Nash bargaining solution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_jd.weighting._solvers.fairness import fair_weights
from hf_jd.weighting.base import Names
from hf_jd.weighting.stateful import Stateful


@dataclass(frozen=True)
class NashMTLWeighting(Stateful):
    """The Nash bargaining solution between the objectives, solved exactly.

    The update maximises the product of the objectives' progress, prod_i <g_i, d>, among updates of equal length; then
    G w = 1/w, and |J^T w| = sqrt(m) whatever the rows' lengths, before `max_norm` applies. Where no update makes
    progress on all objectives, there is no agreement, and w = 0.

    Attributes:
        max_norm: The largest |J^T w|; longer updates are scaled to it. 0 sets no limit.
        update_weights_every: Steps between computations of the weights, which are reused in between. An objective
            without a weight brings the next computation forward.

    References:
        Navon et al., "Multi-Task Learning as a Bargaining Game", arXiv 2202.01017, claim 3.1 and algorithm 1.
    """

    guarantee: ClassVar[str] = "every row makes progress, or w = 0; invariant to each row's scale"
    cost: ClassVar[str] = "ten times m³"

    max_norm: float = 1.0
    update_weights_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_norm < 0 or self.update_weights_every < 1:
            raise ValueError(
                f"Nash-MTL needs max_norm >= 0 and update_weights_every >= 1; they are {self.max_norm} and "
                f"{self.update_weights_every}."
            )

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Solve G w = 1/w, then scale to |J^T w| <= max_norm, [m]."""
        weights = self.memory.read("weights", names, gramian, initial=float("nan"))
        if self.memory.steps % self.update_weights_every == 0 or weights.isnan().any():
            weights = fair_weights(gramian, alpha=1)
            self.memory.write("weights", names, weights)
        self.memory.steps += 1
        norm = (weights @ gramian @ weights).clamp(min=0).sqrt()
        if not self.max_norm:
            return weights
        return weights * torch.where(norm > self.max_norm, self.max_norm / norm, 1)

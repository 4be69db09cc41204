"""Group DRO: weights that shift towards the groups with the largest losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_jd.weighting.base import Names
from hf_jd.weighting.stateful import StatefulLoss


@dataclass(frozen=True)
class GroupDROWeighting(StatefulLoss):
    """Distributionally robust optimisation over groups: exponentiated gradient ascent on the worst mixture's weights.

    q_i <- q_i exp(step_size L_i), normalised over all groups seen so far; w_i = q_i. Absent groups keep their share, up
    to the normalisation, so the weights of the groups present sum to less than 1.

    Attributes:
        step_size: The ascent's step, per unit of loss.

    References:
        Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", arXiv 1911.08731, algorithm 1.
    """

    guarantee: ClassVar[str] = "follows the worst mixture of groups"
    cost: ClassVar[str] = "m"

    step_size: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.step_size > 0:
            raise ValueError(f"step_size is {self.step_size}; give a positive number.")

    def weigh(self, losses: Tensor, names: Names, /) -> Tensor:
        """Update q and return its entries for the groups present, [m]."""
        self.memory.read("weights", names, losses, initial=float("nan"))
        stored = self.memory.values["weights"]
        # A new group starts with 1 / (number of groups).
        mixture = stored.where(~stored.isnan(), 1 / len(stored))
        index = [self.memory.names.index(name) for name in names]
        logarithms = mixture.log()
        logarithms[index] += self.step_size * losses.cpu()
        self.memory.values["weights"] = logarithms.softmax(dim=0)
        return self.memory.values["weights"][index].to(losses.device)

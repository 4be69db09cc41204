"""Uncertainty weighting: divides each loss by a learnt variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_jd.weighting._solvers.log_scale import descend_log_scale
from hf_jd.weighting.base import Names
from hf_jd.weighting.stateful import StatefulLoss


@dataclass(frozen=True)
class UncertaintyWeighting(StatefulLoss):
    """Homoscedastic uncertainty: minimises sum_i exp(-s_i) L_i / 2 + s_i / 2 over the model and the log-variances s.

    w_i = exp(-s_i) / 2. s starts at 0 and takes one implicit gradient step per training step (with the gradient at its
    end point), which is stable for losses of any size.

    Attributes:
        lr: The learning rate of s. The model's optimizer does not update s.

    References:
        Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
        Semantics", arXiv 1705.07115, equation 10.
    """

    guarantee: ClassVar[str] = "none"
    cost: ClassVar[str] = "m"

    lr: float = 0.025

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}; give a positive number.")

    def weigh(self, losses: Tensor, names: Names, /) -> Tensor:
        """Return exp(-s_i) / 2, [m], then update s."""
        if (losses < 0).any():
            raise ValueError(f"Uncertainty weighting needs losses of 0 or more; they are {losses.tolist()}.")
        variances = self.memory.read("log_variances", names, losses)
        self.memory.write("log_variances", names, descend_log_scale(variances, losses, self.lr / 2))
        return (-variances).exp() / 2

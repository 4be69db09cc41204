"""IMTL-L: learns scales that bring all losses to the same size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_jd.weighting._solvers.log_scale import descend_log_scale
from hf_jd.weighting.base import Names
from hf_jd.weighting.stateful import StatefulLoss


@dataclass(frozen=True)
class IMTLLWeighting(StatefulLoss):
    """The loss balance of impartial multi-task learning: minimises sum_i exp(s_i) L_i - s_i over the model and s.

    w_i = exp(s_i), which tends to 1 / L_i. s starts at 0 and takes one implicit gradient step per training step (with
    the gradient at its end point), which is stable for losses of any size. Up to a factor of two, this is
    `uncertainty`.

    Attributes:
        lr: The learning rate of s. The model's optimizer does not update s.

    References:
        Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, equation 8.
    """

    guarantee: ClassVar[str] = "none"
    cost: ClassVar[str] = "m"

    lr: float = 0.025

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}; give a positive number.")

    def weigh(self, losses: Tensor, names: Names, /) -> Tensor:
        """Return exp(s_i), [m], then update s."""
        if (losses < 0).any():
            raise ValueError(f"IMTL-L needs losses of 0 or more; they are {losses.tolist()}.")
        scales = self.memory.read("log_scales", names, losses)
        self.memory.write("log_scales", names, -descend_log_scale(-scales, losses, self.lr))
        return scales.exp()

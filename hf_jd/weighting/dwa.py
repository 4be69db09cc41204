"""DWA: more weight for the losses that fall more slowly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_jd.weighting.base import Names
from hf_jd.weighting.stateful import StatefulLoss


@dataclass(frozen=True)
class DWAWeighting(StatefulLoss):
    """Dynamic weight average: w = m softmax(r / T), r_i = L_i(t-1) / L_i(t-2).

    The paper's t counts epochs. Here it counts windows of `window` steps, over which an objective's loss is averaged.
    Until an objective has completed two windows, its r is 1.

    Attributes:
        temperature: T; the larger, the more equal the weights.
        window: Steps per window, counting those in which the objective is present.

    References:
        Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, equation 7.
    """

    guarantee: ClassVar[str] = "none"
    cost: ClassVar[str] = "m"

    temperature: float = 2.0
    window: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0 or self.window < 1:
            raise ValueError(
                f"DWA needs temperature > 0 and window >= 1; they are {self.temperature} and {self.window}."
            )

    def weigh(self, losses: Tensor, names: Names, /) -> Tensor:
        """Return the weights [m] from the windows completed before this step, and record its losses."""
        nan = float("nan")
        last = self.memory.read("last", names, losses, initial=nan)
        before = self.memory.read("before", names, losses, initial=nan)
        total = self.memory.read("total", names, losses) + losses
        count = self.memory.read("count", names, losses) + 1
        full = count >= self.window
        self.memory.write("before", names, torch.where(full, last, before))
        self.memory.write("last", names, torch.where(full, total / count, last))
        self.memory.write("total", names, torch.where(full, 0, total))
        self.memory.write("count", names, torch.where(full, 0, count))
        rate = (last / before).nan_to_num(nan=1, posinf=1, neginf=1)
        return len(losses) * (rate / self.temperature).softmax(dim=0)

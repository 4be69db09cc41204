"""FAMO: makes all losses fall at the same rate, from their values alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_jd.weighting.base import Names
from hf_jd.weighting.preference import log_losses
from hf_jd.weighting.stateful import StatefulLoss


@dataclass(frozen=True)
class FAMOWeighting(StatefulLoss):
    """Fast adaptive multitask optimization: equal rates of improvement, without gradients of individual losses.

    w = softmax(xi - log L): up to a factor, the update is the gradient of sum_i z_i log L_i, z = softmax(xi). Then xi
    takes a step away from the losses that fell most, xi <- xi - lr (dz/dxi^T [log L(t-1) - log L(t)] + decay xi). The
    paper computes L(t) on the same batch after the update, which costs a second forward; here it is the objective's
    loss at its next step, on another batch.

    Attributes:
        lr: The learning rate of xi.
        decay: The weight decay of xi.

    References:
        Liu, Feng, Stone and Liu, "FAMO: Fast Adaptive Multitask Optimization", arXiv 2306.03792, algorithm 1.
    """

    guarantee: ClassVar[str] = "none for one step; equal rates of improvement over many"
    cost: ClassVar[str] = "m"

    lr: float = 0.025
    decay: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr > 0 or not self.decay >= 0:
            raise ValueError(f"FAMO needs lr > 0 and decay >= 0; they are {self.lr} and {self.decay}.")

    def weigh(self, losses: Tensor, names: Names, /) -> Tensor:
        """Update xi from each loss's change since it was last present, and return softmax(xi - log L), [m]."""
        logs = log_losses("FAMO", losses)
        last = self.memory.read("logs", names, losses, initial=float("nan"))
        logits = self.memory.read("logits", names, losses)
        fallen = torch.where(last.isnan(), 0, last - logs)
        shares = logits.softmax(dim=0)
        logits = logits - self.lr * (shares * (fallen - shares @ fallen) + self.decay * logits)
        self.memory.write("logs", names, logs)
        self.memory.write("logits", names, logits)
        return (logits - logs).softmax(dim=0)

"""Uncertainty weighting: each loss divided by a learnt variance."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_jd.weighting.base import Names
from hf_jd.weighting.stateful import StatefulLoss


@dataclass(frozen=True)
class UncertaintyWeighting(StatefulLoss):
    """Homoscedastic uncertainty: minimises sum_i exp(-s_i) L_i / 2 + s_i / 2 over the model and the log-variances s.

    w_i = exp(-s_i) / 2. After every step s, which starts at 0, takes a step of gradient descent of its own, implicitly
    (its gradient is that of where it arrives), so that losses of any size are safe.

    Attributes:
        lr: The learning rate of s. The model's optimizer does not know s.

    References:
        Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
        Semantics", arXiv 1705.07115, equation 10.
    """

    lr: float = 0.025

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr > 0:
            raise ValueError(f"lr is positive; it is {self.lr}.")

    def weigh(self, losses: Tensor, names: Names, /) -> Tensor:
        """Returns exp(-s_i) / 2, [m], then moves s."""
        if (losses < 0).any():
            raise ValueError(f"Uncertainty weighting needs losses of 0 or more; they are {losses.tolist()}.")
        variances = self.memory.read("log_variances", names, losses)
        self.memory.write("log_variances", names, self._step(variances, losses))
        return (-variances).exp() / 2

    def _step(self, start: Tensor, losses: Tensor) -> Tensor:
        """Solves s = start - lr (1 - L exp(-s)) / 2: the difference of both sides is increasing and concave in s."""
        rate = self.lr / 2
        # From the left of the solution Newton's method goes to it without overshooting.
        s = start - rate
        for _ in range(100):
            pull = rate * losses * (-s).exp()
            step = (start - rate - s + pull) / (1 + pull)
            s = s + step
            if (step.abs() <= 1e-12 * (1 + s.abs())).all():
                break
        return s

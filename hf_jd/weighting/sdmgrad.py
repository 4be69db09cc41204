"""SDMGrad: the shortest update, pulled towards a preferred direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_jd.weighting._solvers.simplex import nearest_on_simplex
from hf_jd.weighting.base import Names
from hf_jd.weighting.preference import checked_numbers, per_objective
from hf_jd.weighting.stateful import Stateful


@dataclass(frozen=True)
class SDMGradWeighting(Stateful):
    """Stochastic direction-oriented multi-objective gradient descent, from one batch.

    The update is (g_w + lambda g_0) / (1 + lambda), g_0 = J^T p, where w on the simplex descends on |g_w + lambda g_0|:
    `n_iter` projected gradient steps with momentum per training step, starting where the last ones ended. G is first
    divided by the square of the rows' mean length. The paper uses J_1 J_2^T of two independent batches for G, and takes
    the update from a third, so that noise adds no bias.

    Attributes:
        lr: The step size of w, positive.
        momentum: The momentum of these steps, in [0, 1).
        n_iter: The number of these steps.
        lambda_: lambda, 0 or more: the pull of g_0; 0 is MGDA.
        pref_vector: p, [m], non-negative and not all zero; None for 1/m each.

    References:
        Xiao, Ban and Ji, "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms",
        arXiv 2305.18409, algorithm 1.
    """

    guarantee: ClassVar[str] = "none for one step; between MGDA and the mean over many"
    cost: ClassVar[str] = "`n_iter` times m²"

    lr: float = 10.0
    momentum: float = 0.5
    n_iter: int = 20
    lambda_: float = 0.3
    pref_vector: Sequence[float] | Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lr > 0 or not 0 <= self.momentum < 1 or self.n_iter < 1 or not self.lambda_ >= 0:
            raise ValueError(
                f"SDMGrad needs lr > 0, momentum in [0, 1), n_iter >= 1 and lambda_ >= 0; they are {self.lr}, "
                f"{self.momentum}, {self.n_iter} and {self.lambda_}."
            )
        if self.pref_vector is not None:
            object.__setattr__(self, "pref_vector", checked_numbers("pref_vector", self.pref_vector))

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Update w and return (w + lambda p) / (1 + lambda), [m]."""
        pull = self.lambda_ * per_objective("pref_vector", self.pref_vector, gramian, 1 / len(gramian))
        shares = self.memory.read_shares("shares", names, gramian)
        square = gramian.diagonal().sqrt().mean().square()
        scaled = gramian / square.where(square > 0, 1)
        velocity = torch.zeros_like(shares)
        for _ in range(self.n_iter):
            velocity = self.momentum * velocity + scaled @ (shares + pull)
            shares = nearest_on_simplex(shares - self.lr * velocity)
        self.memory.write("shares", names, shares)
        return (shares + pull) / (1 + self.lambda_)

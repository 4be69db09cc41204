"""MoDo: MGDA's weights, approached by one gradient step per update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_jd.weighting._solvers.simplex import nearest_on_simplex
from hf_jd.weighting.base import Names
from hf_jd.weighting.stateful import Stateful


@dataclass(frozen=True)
class MoDoWeighting(Stateful):
    """Multi-objective gradient with double sampling, here from a single batch: a slow MGDA.

    lambda <- the point of the simplex nearest to lambda - gamma (G + rho) lambda; the update is J^T lambda. The paper
    uses J_1 J_2^T of two independent batches for G, so noise adds no bias; G = J J^T of one batch favours the rows with
    the least noise. Absent objectives keep their lambda; the lambda of present ones are scaled to a sum of 1.

    Attributes:
        gamma: The step of lambda, positive, per squared length of the rows.
        rho: The pull of lambda towards equal shares, 0 or more.

    References:
        Chen, Fernando, Ying and Chen, "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization
        and Conflict-Avoidance", arXiv 2305.20057, algorithm 1.
    """

    guarantee: ClassVar[str] = "none for one step; MGDA's over many"
    cost: ClassVar[str] = "m²"

    gamma: float = 0.1
    rho: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma > 0 or not self.rho >= 0:
            raise ValueError(f"MoDo needs gamma > 0 and rho >= 0; they are {self.gamma} and {self.rho}.")

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Update lambda and return it, [m]."""
        shares = self.memory.read_shares("shares", names, gramian)
        moved = nearest_on_simplex(shares - self.gamma * (gramian @ shares + self.rho * shares))
        self.memory.write("shares", names, moved)
        return moved

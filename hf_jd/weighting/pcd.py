"""PCD: follows a primary objective, with progress for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_jd.weighting._solvers.cosines import cosine_factor, cosine_matrix
from hf_jd.weighting._solvers.minimum_norm import smallest_solution
from hf_jd.weighting._solvers.quadprog import nearest_point
from hf_jd.weighting.base import Names
from hf_jd.weighting.preference import checked_numbers
from hf_jd.weighting.stateful import Stateful


@dataclass(frozen=True)
class PCDWeighting(Stateful):
    """Priority-constrained descent.

    The update is as near to the primary objective's row as possible while every other objective j makes at least a
    fraction tau of the progress that a step along its own normalised row would make:

        min_d |d - h_1|^2   subject to   <h_j, d> >= tau |h_j|^2,      h_i = g_i / sqrt(moving average of |g_i|^2),

    scaled to the length of g_1. If g_1 = 0 the weights are 0; if the constraints contradict each other, d is g_1.

    Attributes:
        tau: In [0, 1]: one number, or one per other objective, in the order of rows.
        beta: The decay of the moving averages, in [0, 1); averages are bias-corrected.
        primary: The primary objective's name; None for the first row.

    References:
        "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective Optimization",
        TMLR 2026, arXiv 2606.29521. Its epsilon is 0 here.
    """

    guarantee: ClassVar[str] = "the other objectives' progress, where possible"
    cost: ClassVar[str] = "one problem, m² to m³"

    tau: float | Sequence[float] | Tensor = 0.02
    beta: float = 0.999
    primary: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.tau, (Sequence, Tensor)):
            object.__setattr__(self, "tau", checked_numbers("tau", self.tau))
        if not all(0 <= t <= 1 for t in np.atleast_1d(np.asarray(self.tau))) or not 0 <= self.beta < 1:
            raise ValueError(f"PCD needs tau in [0, 1] and beta in [0, 1); they are {self.tau} and {self.beta}.")

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Compute w = (mu_i / |g_i|) |g_1| / |d|, mu the multiples of unit rows that give d, [m]."""
        if self.primary is not None and self.primary not in names:
            raise ValueError(f"The primary objective {self.primary!r} is not among this step's: {list(names)}.")
        first = 0 if self.primary is None else list(names).index(self.primary)
        lengths = gramian.diagonal().sqrt()
        normalised = lengths * self._scales(gramian, names)
        if not lengths[first]:
            return torch.zeros_like(lengths)
        cosines = cosine_matrix(gramian, lengths)
        others = [i for i, length in enumerate(lengths.tolist()) if i != first and length > 0]
        bounds = self._fractions(len(names), first)[others] * normalised[others].cpu().numpy()
        multiples = torch.zeros_like(lengths)
        multiples[first] = normalised[first]
        multiples[others] = gramian.new_tensor(
            _nearest(cosines.cpu().numpy(), first, others, normalised[first].item(), bounds)
        )
        square = multiples @ cosines @ multiples
        if square <= 1e-15 * multiples.sum() ** 2:
            return torch.zeros_like(lengths)
        return torch.where(lengths > 0, multiples / lengths, 0) * lengths[first] / square.sqrt()

    def _scales(self, gramian: Tensor, names: Names) -> Tensor:
        """Update the moving averages of |g_i|^2, bias-corrected per objective, and return 1 / sqrt of each, [m]."""
        average = self.memory.read("squares", names, gramian) * self.beta + gramian.diagonal() * (1 - self.beta)
        weight = self.memory.read("weight", names, gramian) * self.beta + (1 - self.beta)
        self.memory.write("squares", names, average)
        self.memory.write("weight", names, weight)
        return torch.where(average > 0, (weight / average).sqrt(), 0)

    def _fractions(self, m: int, first: int) -> np.ndarray:
        if not isinstance(self.tau, tuple):
            return np.full(m, self.tau)
        if len(self.tau) != m - 1:
            raise ValueError(f"tau has {len(self.tau)} entries; this step has {m - 1} objectives besides the primary.")
        return np.insert(self.tau, first, 0.0)


def _nearest(cosines: np.ndarray, first: int, others: list[int], length: float, bounds: np.ndarray) -> np.ndarray:
    """Find the multipliers of <unit row j, d> >= bound_j for the d nearest to `length` times the first unit row."""
    factor = cosine_factor(cosines)
    rows = factor[others]
    if not len(others):
        return np.zeros(0)
    nearest = nearest_point(length * factor[first], np.ascontiguousarray(rows.T), bounds)
    if nearest is None:  # the constraints contradict each other
        return np.zeros(len(others))
    multipliers = nearest.multipliers
    if factor.shape[1] < len(factor):
        tight = rows @ nearest.point - bounds <= 1e-9 * length
        multipliers[tight] = smallest_solution(rows[tight], multipliers[tight], np.zeros(int(tight.sum())))
    return multipliers

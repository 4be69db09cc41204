"""RACO: CAGrad with its correction clipped to the preferences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_jd.weighting.base import Names
from hf_jd.weighting.cagrad import CAGradWeighting


@dataclass(frozen=True)
class RACOWeighting(CAGradWeighting):
    """Reward-free alignment for conflicting objectives: conflict-averse gradient descent with clipping.

    CAGrad's update is g_0 + c |g_0| g_w / |g_w|, where w on the simplex may give everything to one objective. Here w is
    clipped to min(w_i, p_i), where p are the preferences scaled to a sum of 1, and the correction keeps its length:
    d = g_0 + c |g_0| g_v / |g_v|, v = min(w, p). If g_v = 0, or CAGrad finds the step Pareto stationary, the weights
    are 0.

    References:
        Chen, Li, Chen and Lin, "Reward-free Alignment for Conflicting Objectives", arXiv 2602.02495, algorithm 1.
    """

    guarantee: ClassVar[str] = "within c of the mean; correction clipped to the preferences"
    cost: ClassVar[str] = "a few times m³"

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Compute p + c |g_0| / |g_v| v, v = min(w, p / sum(p)), [m]."""
        preference = self.preference(gramian)
        correction = super().weigh(gramian, names) - preference
        total = correction.sum()
        if not total > 0:
            return correction + preference
        clipped = torch.minimum(correction / total, preference / preference.sum())
        lengths = gramian.diagonal().sqrt()
        square, before = clipped @ gramian @ clipped, preference @ gramian @ preference
        if square <= (1e-7 * (clipped @ lengths)) ** 2:
            return torch.zeros_like(preference)
        return preference + self.c * (before.clamp(min=0) / square).sqrt() * clipped

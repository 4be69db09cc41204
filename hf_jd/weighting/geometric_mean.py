"""The geometric mean of the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_jd.weighting.base import LossWeighting, Names
from hf_jd.weighting.preference import log_losses


@dataclass(frozen=True)
class GeometricMeanWeighting(LossWeighting):
    """Geometric loss strategy: the gradient of (L_1 ... L_m)^(1/m), whose direction doesn't depend on any loss's scale.

    w_i = (L_1 ... L_m)^(1/m) / (m L_i).

    References:
        Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
        Learning", CVPR Workshops 2019, equation 3.
    """

    guarantee: ClassVar[str] = "direction invariant to each loss's scale"
    cost: ClassVar[str] = "m"

    def weigh(self, losses: Tensor, names: Names, /) -> Tensor:
        """Compute w_i = exp(mean(log L) - log L_i) / m, [m]."""
        logs = log_losses("The geometric mean", losses)
        return (logs.mean() - logs).exp() / len(losses)

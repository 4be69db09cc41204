"""GAPO: MGDA on rows rescaled by a power of their length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_jd.weighting.base import Names, Weighting
from hf_jd.weighting.mgda import MGDAWeighting


@dataclass(frozen=True)
class GAPOWeighting(Weighting):
    """Gradient-adaptive policy optimization: MGDA on the rows g_i / |g_i|^p.

    The update is the shortest convex combination of the rescaled rows. With p = 0 it is MGDA, which follows the
    shortest row; with p = 1 (unit rows) all count the same; beyond, the longest row decides. The update conflicts with
    no row.

    Attributes:
        p: The exponent, 0 or more: each row is divided by its length to this power.

    References:
        Li et al., "Gradient-Adaptive Policy Optimization: Towards Multi-Objective Alignment of Large Language Models",
        arXiv 2507.01915, section 3.
    """

    guarantee: ClassVar[str] = "non-conflicting; 0 where Pareto stationary"
    cost: ClassVar[str] = "a few times m³"

    p: float = 1.0

    def __post_init__(self) -> None:
        if not self.p >= 0:
            raise ValueError(f"p is {self.p}; give 0 or more.")

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Compute w = lambda / |g|^p, lambda = argmin |sum_i lambda_i g_i / |g_i|^p| on the simplex, [m]."""
        lengths = gramian.diagonal().sqrt()
        scale = lengths.where(lengths > 0, 1) ** -self.p
        # A common factor doesn't change MGDA's weights, and without it powers may leave float64's range.
        unit = scale / scale.max()
        return MGDAWeighting().weigh(gramian * unit * unit[:, None], names) * scale

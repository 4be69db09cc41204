"""The simplex {w >= 0, sum w = 1}."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_on_simplex(point: Tensor) -> Tensor:
    """Find the w >= 0 of sum 1 nearest to a point, both [m]: w = max(0, point - t)."""
    ordered = point.sort(descending=True).values
    counts = torch.arange(1, len(point) + 1, dtype=point.dtype, device=point.device)
    levels = (ordered.cumsum(dim=0) - 1) / counts
    # levels[j] is the t for which the j + 1 largest entries sum to 1; the last one below its entry is right.
    level = levels.gather(0, (ordered > levels).sum(dim=0, keepdim=True) - 1)
    return (point - level).clamp(min=0)

"""Models that break per-instance gradient engines by how they use plain layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

D = 6


def randn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class Plain(nn.Module):
    """A layer, then a head."""

    def __init__(self, layer: nn.Module, out: int = 4):
        super().__init__()
        self.layer, self.head = layer, nn.LazyLinear(out) if out else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.layer(x))

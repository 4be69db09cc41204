"""Find the fewest cotangents that span the cotangents of every reward.

On-policy, the rewards' cotangents are multiples of each other within each completion: the rows of the completions, from
one backward pass, give the rows of any number of rewards. Where clipping treats good and bad completions differently,
two passes are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_jd.trainer.splitting.cotangents import wide

ROUNDING = 64
"""The rounding units by which cotangents of TRL's loss may differ from being multiples of each other."""


class Direction(NamedTuple):
    """One cotangent per completion, of which some objectives have multiples.

    Attributes:
        gradients: For each output, [B, ...].
        membership: [K, B] the multiples.
    """

    gradients: list[Tensor]
    membership: Tensor


def directions(parts: Sequence[Sequence[Tensor]], advantages: Tensor, noise: Sequence[Tensor]) -> list[Direction]:
    """Find as few cotangents per completion as span every objective's: one, or two by the sign of the advantage.

    Args:
        parts: K objectives' cotangents at each output, [B, ...].
        advantages: [B, K]; where one is 0, so is that objective's cotangent.
        noise: For each output, cotangents [B, ...] whose rounding errors are in `parts`.

    Returns:
        The directions; empty if more than two are needed.
    """
    stacked = [torch.stack(list(of_output)) for of_output in zip(*parts, strict=True)]  # [K, B, ...]
    advantages = advantages.to(stacked[0].dtype)
    tolerances = [_tolerance(c, n) for c, n in zip(stacked, noise, strict=True)]
    positive = _unit(stacked, advantages, 1)
    negative = _unit(stacked, advantages, -1)
    up, down = advantages.T.clamp(min=0), advantages.T.clamp(max=0)
    for c, plus, minus, tolerance in zip(stacked, positive, negative, tolerances, strict=True):
        fitted = wide(up, c) * plus + wide(down, c) * minus
        if ((fitted - c).abs() > tolerance).any():
            return []
    largest = advantages.abs().amax(1)
    has_both = (advantages > 0).any(1) & (advantages < 0).any(1)
    same = all(
        not (has_both & ((wide(largest, p) * (p - m)).abs() > tolerance).flatten(1).any(1)).any()
        for p, m, tolerance in zip(positive, negative, tolerances, strict=True)
    )
    if not same:
        return [Direction(positive, up), Direction(negative, down)]
    is_up = (advantages > 0).any(1)
    return [
        Direction(
            [torch.where(wide(is_up, p), p, m) for p, m in zip(positive, negative, strict=True)], advantages.T.clone()
        )
    ]


def _unit(stacked: Sequence[Tensor], advantages: Tensor, sign: int) -> list[Tensor]:
    """Return each completion's cotangent per unit of advantage of one sign, from its largest advantage; else 0."""
    largest, which = (sign * advantages).max(1)
    rows = torch.arange(len(which), device=which.device)
    scale = torch.where(largest > 0, sign / largest.clamp(min=torch.finfo(largest.dtype).tiny), 0)
    return [wide(scale, c[0]).to(c.dtype) * c[which, rows] for c in stacked]


def _tolerance(stacked: Tensor, noise: Tensor) -> Tensor:
    """Return the rounding error [B, 1, ...] of each completion's cotangents [K, B, ...]."""
    size = stacked.abs().amax(0) + noise.abs()
    size = size.flatten(1).amax(1) if size[0].numel() else size.new_zeros(len(size))
    return wide(ROUNDING * torch.finfo(stacked.dtype).eps * size, noise)

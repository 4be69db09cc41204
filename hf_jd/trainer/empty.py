"""A micro-batch without any example: what a process runs in its place, since others wait for it to run one.

FSDP2 and ZeRO 3 gather weights in each pass, and DDP buffers in the first one, of all processes together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_jd.collator import GROUP_KEY


def holds_examples(batch: Mapping[str, Any]) -> bool:
    """Whether there is any example in a batch: many models fail on a batch of none."""
    return any(value.numel() for key, value in batch.items() if key != GROUP_KEY and isinstance(value, Tensor))


def stand_in(batch: Mapping[str, Any]) -> dict[str, Any]:
    """One example, of zeros, for a batch [0, ...] of none; masks are of ones, for something to attend to."""

    def one(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        sizes = [max(1, size) for size in value.shape]
        return value.new_ones(sizes) if "mask" in key else value.new_zeros(sizes)

    return {key: one(key, value) for key, value in batch.items() if key != GROUP_KEY}

"""Differences between supported releases; each part names the release with which it can be removed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, distributed

# torch 2.13 renamed two collectives, and warns about the old names. Look them up at the call, so that replacing one in
# torch.distributed works. Drop this with torch < 2.13.
_RENAMED = hasattr(distributed, "all_gather_single")
GATHER = "all_gather_single" if _RENAMED else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if _RENAMED else "reduce_scatter_tensor"


def all_gather_single(output: Tensor, tensor: Tensor, async_op: bool = False) -> Any:
    """Gather the tensors [C] of all processes into `output` [W * C]; return the pending work, if any."""
    return getattr(distributed, GATHER)(output, tensor, async_op=async_op)


def reduce_scatter_single(output: Tensor, tensor: Tensor, async_op: bool = False) -> Any:
    """Sum the tensors [W * C] of all processes, each receiving its part in `output` [C]; return any pending work."""
    return getattr(distributed, REDUCE_SCATTER)(output, tensor, async_op=async_op)


def loss_is_scaled_for_ga(trainer: Any) -> bool | None:
    """Return Trainer's `loss_is_scaled_for_ga`; None before transformers 5.19, which added it."""
    return getattr(trainer, "loss_is_scaled_for_ga", None)


def ordering_flag(args: Any) -> str | None:
    """Return the flag that makes Trainer order the examples, instead of shuffling them, if it is set."""
    if getattr(args, "group_by_length", False):  # until transformers 5.2, which has --train_sampling_strategy
        return "--group_by_length"
    strategy = getattr(args, "train_sampling_strategy", "random")
    return None if strategy == "random" else f"--train_sampling_strategy {strategy}"

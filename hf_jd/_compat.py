"""What differs between the releases that hf_jd runs on; each part names the release that it can go with."""

from __future__ import annotations

from typing import Any

from torch import Tensor, distributed

# torch 2.13 renamed two collectives, and warns of the former names. Both are looked up at the call, so that whoever
# replaces one in torch.distributed is heard. They go with torch < 2.13.
_RENAMED = hasattr(distributed, "all_gather_single")
GATHER = "all_gather_single" if _RENAMED else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if _RENAMED else "reduce_scatter_tensor"


def all_gather_single(output: Tensor, tensor: Tensor, async_op: bool = False) -> Any:
    """Gathers the tensors [C] of all processes into `output` [W * C]; returns the work that is under way, if any."""
    return getattr(distributed, GATHER)(output, tensor, async_op=async_op)


def reduce_scatter_single(output: Tensor, tensor: Tensor, async_op: bool = False) -> Any:
    """Sums the tensors [W * C] of all processes, of which each gets its part in `output` [C]; returns the same."""
    return getattr(distributed, REDUCE_SCATTER)(output, tensor, async_op=async_op)


def loss_is_scaled_for_ga(trainer: Any) -> bool | None:
    """Whether `compute_loss` is scaled for gradient accumulation; None, before transformers 5.19: it isn't said."""
    return getattr(trainer, "loss_is_scaled_for_ga", None)


def ordering_flag(args: Any) -> str | None:
    """The flag by which Trainer orders the examples otherwise than at random, if there is one."""
    if getattr(args, "group_by_length", False):  # until transformers 5.2, which has --train_sampling_strategy
        return "--group_by_length"
    strategy = getattr(args, "train_sampling_strategy", "random")
    return None if strategy == "random" else f"--train_sampling_strategy {strategy}"

"""The processes that train together: how many there are, and what they gather, add up and agree on."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from hf_jd._compat import all_gather_single


def process_count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return distributed.get_rank() if process_count() > 1 else 0


def gather(tensor: Tensor) -> Tensor:
    """[W, ...] the tensors [...] of all processes, in their order; all of one shape."""
    if process_count() == 1:
        return tensor[None]
    gathered = tensor.new_empty(process_count(), *tensor.shape)
    all_gather_single(gathered.view(-1), tensor.reshape(-1))
    return gathered


def gather_uneven(rows: Tensor, lengths: list[int] | None = None) -> tuple[Tensor, slice]:
    """Concatenates [m_r, ...] of all processes r, in their order.

    Args:
        rows: Those of this process.
        lengths: [W] every m_r, if they are known already.

    Returns:
        [M, ...], and where the rows of this process are in it.
    """
    if process_count() == 1:
        return rows, slice(0, len(rows))
    if lengths is None:
        lengths = gather(torch.tensor(len(rows), device=rows.device)).tolist()
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    start = sum(lengths[: rank()])
    every = torch.cat([part[:n] for part, n in zip(gather(padded), lengths, strict=True)])
    return every, slice(start, start + len(rows))


def add_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if process_count() > 1:
        distributed.all_reduce(tensor)
    return tensor


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set on some process."""
    return flag if process_count() == 1 else bool(add_over_processes(torch.tensor(float(flag), device=device)))

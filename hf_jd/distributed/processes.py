"""The processes that train together: their number, and how they gather, add up and agree."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from hf_jd._compat import all_gather_single


def process_count() -> int:
    """Return the number of processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return the index of this process."""
    return distributed.get_rank() if process_count() > 1 else 0


def gather(tensor: Tensor) -> Tensor:
    """Stack the tensors [...] of all processes, which share one shape, in rank order: [W, ...]."""
    if process_count() == 1:
        return tensor[None]
    gathered = tensor.new_empty(process_count(), *tensor.shape)
    all_gather_single(gathered.view(-1), tensor.reshape(-1))
    return gathered


def gather_uneven(rows: Tensor, lengths: list[int] | None = None) -> tuple[Tensor, slice]:
    """Concatenate [m_r, ...] of all processes r, in rank order.

    Args:
        rows: This process's rows.
        lengths: [W] every m_r, if already known.

    Returns:
        [M, ...], and the slice of this process's rows.
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
    """Sum a tensor over all processes, in place."""
    if process_count() > 1:
        distributed.all_reduce(tensor)
    return tensor


def anywhere(flag: bool, device: torch.device) -> bool:
    """Return whether a flag is set on any process."""
    return flag if process_count() == 1 else bool(add_over_processes(torch.tensor(float(flag), device=device)))

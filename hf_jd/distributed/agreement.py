"""Check that all processes train the same: compare their settings, and from time to time the weights, by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from hf_jd.distributed.processes import gather, process_count

_CHUNK = 4 * 1024 * 1024  # elements to hash at a time


def check_alike(facts: Mapping[str, Any]) -> None:
    """Compare the settings of all processes, by hash.

    Args:
        facts: Everything that has to be the same, by name; compared by `repr`.

    Raises:
        ValueError: Something differs; raised, with its name, on all processes.
    """
    if process_count() == 1:
        return
    hashes = {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in facts.items()}
    every: list[Any] = [None] * process_count()
    distributed.all_gather_object(every, hashes)
    names = [name for name in hashes if len({theirs.get(name) for theirs in every}) > 1]
    if names:
        first = f" (here: {facts[names[0]]!r:.100})"
        raise ValueError(
            f"The processes differ in {', '.join(f'`{name}`' for name in names)}{first}. Start all of them with one "
            "command, with the same seed, the same data in the same order, and the same flags."
        )


def check_weights(parameters: Mapping[str, nn.Parameter], step: int) -> None:
    """Compare the parameters of all processes, bit by bit, with one hash each; skip sharded ones.

    Args:
        parameters: By name, in the same order on all processes. Parameters that are gathered only for use are empty.
        step: The number of updates so far.

    Raises:
        ValueError: Some differ; raised, with the first one's name, on all processes.
    """
    whole = {name: p for name, p in parameters.items() if not isinstance(p, DTensor) and p.numel()}
    if process_count() == 1 or not whole:
        return
    every = gather(torch.stack([_bits(p.detach()) for p in whole.values()]))
    differing = (every != every[0]).any(0).tolist()
    names = [name for name, differs in zip(whole, differing, strict=True) if differs]
    if names:
        raise ValueError(
            f"After {step} updates, {len(names)} of {len(whole)} parameters are not the same on all processes (first: "
            f"`{names[0]}`): was the model changed on one of them, or built with another seed? Resume from an earlier "
            "checkpoint."
        )


def _bits(tensor: Tensor) -> Tensor:
    """Hash the bits of all elements, weighted by their position: int64, 0-d."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in tensor.reshape(-1).view(whole).split(_CHUNK):
        places = torch.arange(1, 2 * len(chunk), 2, device=tensor.device)
        total = total * 31 + (chunk.long() * places).sum()
    return total

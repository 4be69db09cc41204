"""Do all processes train the same? What they were given, and from time to time the weights, compared by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from hf_jd.distributed.processes import gather, process_count

_CHUNK = 4 * 1024 * 1024  # elements that are hashed at a time


def check_alike(facts: Mapping[str, Any]) -> None:
    """Compares what each process was given, by hash.

    Args:
        facts: What has to be the same, by name; each is compared by its `repr`.

    Raises:
        ValueError: Something isn't; names it, on all processes.
    """
    if process_count() == 1:
        return
    own = {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in facts.items()}
    every: list[Any] = [None] * process_count()
    distributed.all_gather_object(every, own)
    names = [name for name in own if len({theirs.get(name) for theirs in every}) > 1]
    if names:
        first = f" (here: {facts[names[0]]!r:.100})"
        raise ValueError(
            f"The processes were not given the same: {', '.join(f'`{name}`' for name in names)}{first}. Start all of "
            "them by one command, with one seed, one data set in one order, and the same flags."
        )


def check_weights(parameters: Mapping[str, nn.Parameter], step: int) -> None:
    """Compares the parameters, bit by bit, by a hash of each; of those that are shared out there is nothing to compare.

    Args:
        parameters: By name; in the same order on all processes. ZeRO 3's are empty.
        step: The updates until now.

    Raises:
        ValueError: Some differ; names them, on all processes.
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
            f"`{names[0]}`): was the model changed on one of them, or built from another seed? Go on from an earlier "
            "checkpoint."
        )


def _bits(tensor: Tensor) -> Tensor:
    """[] int64, of the bits of all elements, each with a weight of its place."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in tensor.reshape(-1).view(whole).split(_CHUNK):
        places = torch.arange(1, 2 * len(chunk), 2, device=tensor.device)
        total = total * 31 + (chunk.long() * places).sum()
    return total

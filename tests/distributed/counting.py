"""Counts what collectives send, by wrapping them."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, distributed

from hf_jd._compat import GATHER, REDUCE_SCATTER

deadly: dict[str, int] = {}
"""The call in which this process is killed, if it is to be."""


class Call(NamedTuple):
    """One call of a collective.

    Attributes:
        name: The function's name.
        sent: The bytes that this process sends to others, by the cheapest known algorithm.
    """

    name: str
    sent: float


_now: list[list[Call]] = []
"""Where calls are noted, the innermost last: DeepSpeed keeps the functions that it finds when it starts."""


def _sent(name: str, bound: Any) -> float:
    """Count bytes: of a ring for reductions and gathers, and of what goes to other processes in an all-to-all."""
    processes = distributed.get_world_size()
    share = (processes - 1) / processes
    tensors = [value for value in bound if isinstance(value, Tensor)]
    largest = max((t.nbytes for t in tensors), default=0)
    if name == "all_to_all_single":
        _, sent, _, sizes = bound[:4]
        return sum(size for r, size in enumerate(sizes) if r != distributed.get_rank()) * sent.element_size()
    return share * largest * (2 if name == "all_reduce" else 1)


@contextmanager
def counted() -> Iterator[list[Call]]:
    """Record all calls of collectives by hf_jd and DeepSpeed, but not DDP's, within the context."""
    calls: list[Call] = []
    names = {"all_reduce", "all_to_all_single", "all_gather", "broadcast", GATHER, REDUCE_SCATTER}
    names |= {"all_gather_into_tensor", "reduce_scatter_tensor"}  # DeepSpeed's collectives, under their old names
    before = {name: getattr(distributed, name) for name in names}

    def wrapped(name: str) -> Any:
        @functools.wraps(before[name])
        def call(*args: Any, **kwargs: Any) -> Any:
            if _now:
                _now[-1].append(Call(name, _sent(name, [*args, *kwargs.values()])))
            if len(calls) == deadly.get("call"):
                os.kill(os.getpid(), signal.SIGKILL)
            return before[name](*args, **kwargs)

        return call

    for name in names:
        setattr(distributed, name, wrapped(name))
    _now.append(calls)
    try:
        yield calls
    finally:
        _now.pop()
        for name, function in before.items():
            setattr(distributed, name, function)

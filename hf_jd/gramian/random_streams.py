"""The global random streams of torch, numpy and Python: what is called again draws nothing from them."""

import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Where the streams stand.

    Attributes:
        cpu: Of torch, on the CPU.
        device: Of torch, on the device; None where that is the CPU.
        numpy: Of numpy's global functions.
        python: Of the module `random`.
    """

    cpu: Tensor
    device: Tensor | None
    numpy: dict[str, Any]
    python: tuple[Any, ...]


def random_state(device: torch.device) -> RandomState:
    """Where the streams stand now, that of one device among them."""
    # Metal has one stream, and its functions take no device.
    where = () if device.type == "mps" else (device,)
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(*where)
    return RandomState(torch.get_rng_state(), on_device, np.random.get_state(legacy=False), random.getstate())


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Puts the streams back to where they stood."""
    torch.set_rng_state(state.cpu)
    if state.device is not None:
        where = () if device.type == "mps" else (device,)
        torch.get_device_module(device).set_rng_state(state.device, *where)
    np.random.set_state(state.numpy)
    random.setstate(state.python)


@contextmanager
def unchanged_streams(device: torch.device) -> Generator[Callable[[], bool]]:
    """Puts the streams back at its end; yields a function that tells whether something has been drawn since."""
    before = random_state(device)
    try:
        yield lambda: not _equal(before.__dict__, random_state(device).__dict__)
    finally:
        set_random_state(before, device)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, Tensor | np.ndarray):
        return bool((a == b).all())
    return a == b

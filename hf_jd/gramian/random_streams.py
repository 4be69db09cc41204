"""Save and restore the global random streams of torch, numpy and Python, so that repeated calls draw nothing."""

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
    """The states of the random streams.

    Attributes:
        cpu: torch's state on the CPU.
        device: torch's state on the device; None if that is the CPU.
        numpy: The state of numpy's global functions.
        python: The state of the module `random`.
    """

    cpu: Tensor
    device: Tensor | None
    numpy: dict[str, Any]
    python: tuple[Any, ...]


def random_state(device: torch.device) -> RandomState:
    """Return the states of the streams, on the CPU and on one device."""
    # Metal has a single stream, and its functions take no device.
    where = () if device.type == "mps" else (device,)
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(*where)
    return RandomState(torch.get_rng_state(), on_device, np.random.get_state(legacy=False), random.getstate())


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Restore the states of the streams."""
    torch.set_rng_state(state.cpu)
    if state.device is not None:
        where = () if device.type == "mps" else (device,)
        torch.get_device_module(device).set_rng_state(state.device, *where)
    np.random.set_state(state.numpy)
    random.setstate(state.python)


@contextmanager
def unchanged_streams(device: torch.device) -> Generator[Callable[[], bool]]:
    """Restore the streams on exit; yield a function that tells whether anything has been drawn."""
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

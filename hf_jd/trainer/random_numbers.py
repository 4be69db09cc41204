"""The state of the random numbers, for forward passes that are repeated."""

from __future__ import annotations

import torch
from torch import Tensor


def rng_state(device: torch.device) -> list[Tensor]:
    """That of the CPU, and of the device if it is another."""
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def set_rng_state(states: list[Tensor], device: torch.device) -> None:
    """Goes back to a state."""
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)

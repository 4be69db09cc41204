"""Calling a module again, with other tensors in the place of its parameters and buffers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def call_again(
    module: nn.Module, tensors: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Any:
    """What a module returns with `tensors` in the place of those of that name, wherever it holds them.

    Each place is filled once: `torch.func.functional_call` by itself fills what a module shared by two parents holds
    twice, and then leaves the second filling there.
    """
    named = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    wanted = {id(named[name]): tensor for name, tensor in tensors.items()}
    places = {}
    for path, owner in module.named_modules():
        for name, held in [*owner._parameters.items(), *owner._buffers.items()]:
            if held is not None and id(held) in wanted:
                places[f"{path}.{name}" if path else name] = wanted[id(held)]
    return functional_call(module, places, tuple(args), dict(kwargs or {}), tie_weights=False)


def copied_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's buffers, for another call to change."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def check_buffers(module: nn.Module, copies: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError where a second call changed the copies of a module's buffers: its forward has a memory."""
    if any(not torch.equal(copies[name], buffer) for name, buffer in module.named_buffers()):
        raise RuntimeError("the module's forward changes its buffers, so that another call computes something else")

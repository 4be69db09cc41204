"""Calling a module again, with other tensors in the place of its parameters and buffers."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_jd.gramian.layouts import DrawsError
from hf_jd.gramian.random_streams import unchanged_streams


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


@contextmanager
def without_traces(module: nn.Module, device: torch.device, replayed: bool = False) -> Generator[dict[str, Tensor]]:
    """Calls of a module within it change no buffer and draw no global random numbers.

    Args:
        module: The module.
        device: Where its random numbers come from, beside the CPU.
        replayed: Whether the calls get the random numbers of its forward.

    Yields:
        Copies of the module's buffers, for those calls to change.

    Raises:
        DrawsError: At its end, where the module has drawn random numbers that are not those of its forward.
        RuntimeError: At its end, where the copies have changed: the forward has a memory.
    """
    copies = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with unchanged_streams(device) as has_drawn:
        yield copies
        if not replayed and has_drawn():
            raise DrawsError
    if any(not torch.equal(copies[name], buffer) for name, buffer in module.named_buffers()):
        raise RuntimeError("the module's forward changes its buffers, so that another call computes something else")

"""FSDP2 and ZeRO 3: parameters are whole inside forwards and backwards, and shared out outside.

Rows are those of whole parameters. Under FSDP2 they are filed under the sharded ones, which the optimizer holds; ZeRO
3 empties and fills the same ones. Every backward pass gathers shards anew, so that all processes must make the same
number of passes, whatever their data makes necessary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule


def fsdp_parameters(modules: Iterable[nn.Module]) -> list[Any]:
    """What FSDP2 keeps of each of its parameters, in a private place: it offers no other way to a whole parameter."""
    states = [m._get_fsdp_state() for root in modules for m in root.modules() if isinstance(m, FSDPModule)]
    # A module has one group in torch 2.9, or None, and a list of them in 2.13; the former goes with torch < 2.13.
    groups = [vars(state).get("_fsdp_param_groups", [vars(state).get("_fsdp_param_group")]) for state in states]
    return [parameter for several in groups for group in several if group for parameter in group.fsdp_params]


def whole_parameters(modules: Iterable[nn.Module]) -> dict[nn.Parameter, nn.Parameter]:
    """By sharded parameter, the whole one that forwards use; those that were not gathered yet are left out."""
    return {p.sharded_param: p._unsharded_param for p in fsdp_parameters(modules) if hasattr(p, "_unsharded_param")}


def is_partitioned(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether ZeRO 3 shares the parameters out: it marks all of a model's, and they stay the same objects."""
    return hasattr(next(iter(parameters), None), "ds_id")


def whole_bytes(parameter: nn.Parameter) -> int:
    """Bytes of a parameter, also where ZeRO 3 has emptied it."""
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()


def is_sharded(modules: Iterable[nn.Module]) -> bool:
    """Whether some module is FSDP2's."""
    return any(isinstance(m, FSDPModule) for root in modules for m in root.modules())


def layer_type(module: nn.Module) -> type[nn.Module]:
    """The module's class, before FSDP2 derived another one from it."""
    if not isinstance(module, FSDPModule):
        return type(module)
    return cast(type[nn.Module], type(module).__bases__[1])  # FSDP2 derives its classes from (FSDPModule, the class).


class Lockstep:
    """Keeps the backward passes of all processes in step.

    A process says before each pass that it makes one. One that has made all of its own makes idle ones for as long as
    another says so.

    Args:
        device: Where the processes' words are added up.
    """

    def __init__(self, device: torch.device):
        self._device = device

    def announce(self) -> None:
        """Says that this process makes a pass."""
        self._some(True)

    def others(self) -> bool:
        """Says that this process has made its passes; whether another makes one now."""
        return self._some(False)

    def _some(self, wanted: bool) -> bool:
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return False
        flag = torch.tensor(float(wanted), device=self._device)
        distributed.all_reduce(flag)
        return bool(flag)

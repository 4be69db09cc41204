"""FSDP2 and ZeRO 3: parameters are whole inside forwards and backwards, and sharded outside.

Rows belong to whole parameters. Under FSDP2, they are stored under the sharded parameters, which the optimizer holds;
ZeRO 3 empties and refills the same parameters. Every backward pass gathers shards, so all processes have to run the
same number of passes, even if their data needs fewer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule


def fsdp_parameters(modules: Iterable[nn.Module]) -> list[Any]:
    """Return FSDP2's private records of its parameters: it offers no other way to a whole parameter."""
    states = [m._get_fsdp_state() for root in modules for m in root.modules() if isinstance(m, FSDPModule)]
    # torch 2.9 has one group per module, or None; 2.13 has a list. Drop the former with torch < 2.13.
    groups = [vars(state).get("_fsdp_param_groups", [vars(state).get("_fsdp_param_group")]) for state in states]
    return [parameter for several in groups for group in several if group for parameter in group.fsdp_params]


def whole_parameters(modules: Iterable[nn.Module]) -> dict[nn.Parameter, nn.Parameter]:
    """Map sharded parameters to the whole ones that forwards use, leaving out those not gathered yet."""
    return {p.sharded_param: p._unsharded_param for p in fsdp_parameters(modules) if hasattr(p, "_unsharded_param")}


def is_partitioned(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether ZeRO 3 shards the parameters: it marks all parameters of a model, which stay the same objects."""
    return hasattr(next(iter(parameters), None), "ds_id")


def whole_bytes(parameter: nn.Parameter) -> int:
    """Return the bytes of a whole parameter, even if ZeRO 3 has emptied it."""
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()


def is_sharded(modules: Iterable[nn.Module]) -> bool:
    """Return whether FSDP2 shards some module."""
    return any(isinstance(m, FSDPModule) for root in modules for m in root.modules())


def layer_type(module: nn.Module) -> type[nn.Module]:
    """Return the module's original class, from which FSDP2 derives its own."""
    if not isinstance(module, FSDPModule):
        return type(module)
    return cast(type[nn.Module], type(module).__bases__[1])  # FSDP2 derives its class from (FSDPModule, original).


class Lockstep:
    """Announcements that keep the backward passes of all processes in step.

    Each process announces its passes. A process that has run all of its passes runs idle ones while others announce
    more.

    Args:
        device: Where announcements are summed.
    """

    def __init__(self, device: torch.device):
        self._device = device

    def announce(self) -> None:
        """Announce a pass of this process."""
        self._some(True)

    def others(self) -> bool:
        """Announce that this process is done; return whether another process runs a pass now."""
        return self._some(False)

    def _some(self, wanted: bool) -> bool:
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return False
        flag = torch.tensor(float(wanted), device=self._device)
        distributed.all_reduce(flag)
        return bool(flag)

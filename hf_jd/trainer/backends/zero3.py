"""ZeRO 3: parameters are empty between passes, while rows, their columns and their proof are of whole ones.

What is used here of DeepSpeed (0.19) beside its documented `GatheredParameters` is what its own hooks go by: the
modules that a parameter is in use by, the counts of a module's passes, and the trace of what to fetch ahead.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_jd.gramian import Engine
from hf_jd.gramian.sharding import is_partitioned

_MEASURING = -1  # among the modules that a parameter is in use by; DeepSpeed numbers its own from 0


@contextmanager
def measuring(model: nn.Module, engine: Engine) -> Generator[None]:
    """Has a model under ZeRO 3 stand a measuring pass; others do so anyway.

    The parameters of the modules that bring rows are gathered meanwhile. What is in other modules stays shared out, and
    is gathered by DeepSpeed for each of them, in each of several passes through one graph.

    Args:
        model: DeepSpeed's engine, or another model.
        engine: What measures.
    """
    held = engine.held() if engine.sharded else []  # To list them takes time.
    if not is_partitioned(held):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters  # Not a dependency: who partitions parameters has it.

    optimizer: Any = model.optimizer
    coordinator, inside = optimizer.parameter_offload.get_param_coordinator(), model.get_submodule("module")
    leaves = {module: module._backward_hooks for module in optimizer.leaf_parameters}
    with GatheredParameters(held):
        for p in held:
            p.ds_active_sub_modules.add(_MEASURING)  # ty: ignore[missing-attribute]
        hooks = [
            inside.register_forward_pre_hook(lambda *_: _forget(coordinator), prepend=True),
            inside.register_forward_hook(_Repeatable(coordinator)),
        ]
        for module in leaves:
            module._backward_hooks = OrderedDict()  # Of experts, they take any backward for DeepSpeed's own.
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, own in leaves.items():
                module._backward_hooks = own
            for p in held:
                p.ds_active_sub_modules.clear()  # ty: ignore[missing-attribute]
            _forget(coordinator)


def _forget(coordinator: Any) -> None:
    """Has DeepSpeed fetch nothing ahead: it would go by the modules' order in another pass, or on another process."""
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


class _Repeatable:
    """A forward hook that lets several backward passes walk one graph.

    DeepSpeed gathers a module's parameters at its gradient as often as the module was called, and lets them go when the
    gradients of all its inputs have passed: it counts down, and is through after one pass. Here the counts begin anew
    in each; and what the last one has left gathered is let go first, so that all processes gather as much.

    Args:
        coordinator: Of DeepSpeed's parameters.
    """

    def __init__(self, coordinator: Any):
        self._coordinator = coordinator
        self._counts: dict[nn.Module, dict[str, int]] = {}
        self._passed = -1

    def __call__(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Notes the counts after a forward, and has its backward passes begin with them."""
        names = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")
        for module in model.modules():
            self._counts[module] = {name: module.__dict__[name] for name in names if name in module.__dict__}
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._restart)

    def _restart(self, gradient: Tensor) -> None:
        now = torch._C._current_graph_task_id()
        if now != self._passed:
            self._passed = now
            self._coordinator.release_backward_leftovers()
            for module, counts in self._counts.items():
                module.__dict__.update(counts)

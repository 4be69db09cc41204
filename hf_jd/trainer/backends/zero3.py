"""ZeRO 3: parameters are empty between passes, but rows, their columns and their proof need whole parameters.

Besides DeepSpeed's documented `GatheredParameters`, this uses internals that its own hooks (0.19) rely on: the modules
that use a parameter, the counts of a module's passes, and the trace of parameters to prefetch.
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

_MEASURING = -1  # stands for a module that uses a parameter; DeepSpeed numbers its own from 0


@contextmanager
def measuring(model: nn.Module, engine: Engine) -> Generator[None]:
    """Prepare a ZeRO-3 model for a measuring pass; a no-op otherwise.

    Within the context, the parameters of the modules that form rows are gathered. Other parameters stay sharded, and
    DeepSpeed gathers them module by module, in each of several passes through the same graph.

    Args:
        model: DeepSpeed's engine, or another model.
        engine: The engine that measures.
    """
    held = engine.held() if engine.sharded else []  # listing them takes time
    if not is_partitioned(held):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters  # not a dependency: it is there if parameters are partitioned

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
            module._backward_hooks = OrderedDict()  # experts' hooks mistake any backward for DeepSpeed's own
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, backward_hooks in leaves.items():
                module._backward_hooks = backward_hooks
            for p in held:
                p.ds_active_sub_modules.clear()  # ty: ignore[missing-attribute]
            _forget(coordinator)


def _forget(coordinator: Any) -> None:
    """Stop DeepSpeed's prefetching, which would follow the modules' order of another pass or process."""
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


class _Repeatable:
    """A forward hook that allows several backward passes through the same graph.

    DeepSpeed gathers a module's parameters at its gradient as often as the module was called, and releases them when
    the gradients of all inputs have passed: its counters run out after one pass. This resets the counters in each pass,
    and first releases what the last pass left gathered, so that all processes gather the same.

    Args:
        coordinator: DeepSpeed's coordinator of parameters.
    """

    def __init__(self, coordinator: Any):
        self._coordinator = coordinator
        self._counts: dict[nn.Module, dict[str, int]] = {}
        self._passed = -1

    def __call__(self, model: nn.Module, args: tuple, output: Any) -> None:
        """Store the counters after a forward, and restore them in each of its backward passes."""
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

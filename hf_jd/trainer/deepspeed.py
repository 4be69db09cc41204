"""DeepSpeed: its engine owns the backward pass, `.grad` and the optimizer's step, so that an update takes two passes.

The first one measures rows on the model inside the engine, with `autograd.grad`, so that none of the engine's hooks takes
it for its own. The second gives the engine the weighed losses, once a micro-batch; in the last one, accelerate has it
take its step.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_jd.distributed.processes import process_count
from hf_jd.gramian import Engine
from hf_jd.gramian.sharding import is_partitioned
from hf_jd.trainer.random_numbers import set_rng_state
from hf_jd.trainer.recording import Recorded, Recorder

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin

_MEASURING = -1  # among the modules that a parameter is in use by; DeepSpeed's own are numbered from 0


def second_pass_of_deepspeed(
    recorder: Recorder, model: nn.Module, recorded: Sequence[Recorded], weights: Tensor, usable: Tensor
) -> None:
    """Descends sum_k w_k loss_k, and the mean of what no instance owns; see `second_pass`.

    Args:
        recorder: Who recorded, on the model inside.
        model: DeepSpeed's engine.
        recorded: The micro-batches of this process after their first pass.
        weights: [m] of this process's objectives.
        usable: [m] (bool); other losses or rows may be NaN, and are not touched.
    """
    trainer, start = recorder.trainer, 0
    state = trainer.accelerator.gradient_state
    steps = state.sync_gradients
    for i, one in enumerate(recorded):
        mine = slice(None) if recorder.kind.shared else slice(start, start + len(one.losses))
        start += len(one.losses)
        set_rng_state(one.rng_state, trainer.args.device)
        parts, extra = recorder.parts(one.batch, again=True, model=model)
        losses = torch.cat([part.losses for part in parts])[usable[mine]]
        # The engine averages over processes; and all of them have to call it, with losses or without.
        total = (weights[mine][usable[mine]].to(losses) * losses).sum() * process_count()
        if extra is not None:
            total = total + torch.where(extra.isfinite(), extra, 0) / recorder.micro_batches
        state._set_sync_gradients(steps and i == len(recorded) - 1)
        trainer.accelerator.backward(total, scale_wrt_gas=False)
    state._set_sync_gradients(steps)


def measured_model(trainer: JDTrainerMixin, model: nn.Module) -> nn.Module:
    """The model to measure rows on: as Trainer has wrapped it, or inside DeepSpeed's engine.

    A forward of the engine prepares its own reduction, which any backward from the outputs would then begin.
    """
    return model.get_submodule("module") if trainer.is_deepspeed_enabled else model


@contextmanager
def measuring(model: nn.Module, engine: Engine) -> Generator[None]:
    """Has ZeRO 3, which empties parameters between passes, stand a measuring pass; of other models nothing is asked.

    Rows, their columns and their proof are of whole parameters: those of the modules that bring rows are gathered
    meanwhile. What is in other modules stays shared out, and is gathered by DeepSpeed for each of them, in each of several
    passes through one graph.

    Args:
        model: DeepSpeed's engine, or another model.
        engine: What measures.
    """
    held = engine.held()
    if not is_partitioned(held):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters  # Not a dependency: who partitions parameters has it.

    optimizer: Any = model.optimizer
    coordinator, inside = optimizer.parameter_offload.get_param_coordinator(), model.get_submodule("module")
    with GatheredParameters(held):
        for p in held:
            p.ds_active_sub_modules.add(_MEASURING)  # ty: ignore[unresolved-attribute]
        hooks = [
            inside.register_forward_pre_hook(lambda *_: _forget(coordinator), prepend=True),
            inside.register_forward_hook(_Repeatable(coordinator)),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for p in held:
                p.ds_active_sub_modules.clear()  # ty: ignore[unresolved-attribute]
            _forget(coordinator)


def _forget(coordinator: Any) -> None:
    """Has DeepSpeed fetch nothing ahead: it would go by the modules' order in another pass, or on another process."""
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


class _Repeatable:
    """A forward hook that lets several backward passes walk one graph.

    DeepSpeed (0.19) gathers a module's parameters at its gradient as often as the module was called, and lets them go when
    the gradients of all its inputs have passed: it counts down, and is through after one pass. Here the counts begin anew
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

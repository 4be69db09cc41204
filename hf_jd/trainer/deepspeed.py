"""DeepSpeed: its engine owns the backward pass, `.grad` and the optimizer's step, so that an update takes two passes.

The first one measures rows on the model inside the engine, with `autograd.grad`, so that none of the engine's hooks
takes it for its own. The second gives the engine the weighed losses, once a micro-batch; in the last one, accelerate
has it take its step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_jd.batches import selected
from hf_jd.distributed.processes import process_count
from hf_jd.gramian.random_streams import set_random_state
from hf_jd.objectives import Part
from hf_jd.packing import documents_of
from hf_jd.trainer.recording import Recorded, Recorder

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin


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
        assert one.random_state is not None
        set_random_state(one.random_state, trainer.args.device)
        batch, left = _without_broken(one, usable[mine], recorder)
        parts, extra = recorder.parts(batch, again=True, model=model)
        kept = usable[mine][left]
        # A smaller batch may be divided by another number.
        each = (weights[mine] / _denominators(one.parts).to(weights))[left][kept]
        losses = torch.cat([part.losses for part in parts])
        losses = (losses * _denominators(parts).to(losses))[kept]
        # The engine averages over processes; and all of them have to call it, with losses or without.
        total = (each.to(losses) * losses).sum() * process_count()
        if extra is not None and extra.isfinite():
            total = total + extra / recorder.micro_batches
        state._set_sync_gradients(steps and i == len(recorded) - 1)
        trainer.accelerator.backward(total, scale_wrt_gas=False)
    state._set_sync_gradients(steps)


def _denominators(parts: Sequence[Part]) -> Tensor:
    """[m] what losses were divided by; 1 where that is known only when all have been counted."""
    known = [p.counts.new_ones(len(p.counts)) if p.denominators is None else p.denominators for p in parts]
    return torch.cat([found.double() for found in known])


def _without_broken(one: Recorded, usable: Tensor, recorder: Recorder) -> tuple[Mapping[str, Any], Tensor]:
    """The micro-batch without the instances of objectives that aren't finite, whose gradient times 0 would be NaN.

    Args:
        one: The micro-batch.
        usable: [m] (bool) of its objectives.
        recorder: Who recorded it. Shared objectives stay the same ones without those instances.

    Returns:
        The batch, and which of the m objectives it has (bool).
    """
    (part,) = one.parts
    broken = (part.counts > 0).to(usable.device) & ~usable
    if not broken.any():
        return one.batch, torch.ones_like(usable)
    out = (part.segments >= 0) & broken.to(part.segments.device)[part.segments.clamp(min=0)]
    documents = documents_of(one.batch, recorder.trainer.jd_args.jd_packed)
    keep = ~out
    if documents is not None:
        keep = torch.ones(int(documents.max()) + 1, dtype=torch.bool, device=out.device)
        keep[documents.to(out.device)[out]] = False
    left = torch.ones_like(usable) if recorder.kind.shared else ~broken
    return selected(one.batch, keep, documents), left


def measured_model(trainer: JDTrainerMixin, model: nn.Module) -> nn.Module:
    """The model to measure rows on: as Trainer has wrapped it, or inside DeepSpeed's engine.

    A forward of the engine prepares its own reduction, which any backward from the outputs would then begin.
    """
    return trainer.accelerator.unwrap_model(model) if trainer.is_deepspeed_enabled else model

"""DeepSpeed: its engine owns the backward pass, `.grad` and the optimizer's step, so that an update takes two passes.

The first one measures rows with `autograd.grad`, so that none of the engine's hooks sees it. The second gives the
engine the weighed losses, once a micro-batch; in the last one, accelerate has the engine take its step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_jd.distributed.processes import process_count
from hf_jd.trainer.random_numbers import set_rng_state
from hf_jd.trainer.recording import Recorded, Recorder


def second_pass_of_deepspeed(recorder: Recorder, recorded: Sequence[Recorded], weights: Tensor, usable: Tensor) -> None:
    """Descends sum_k w_k loss_k, and the mean of what no instance owns; see `second_pass`."""
    trainer, start = recorder.trainer, 0
    state = trainer.accelerator.gradient_state
    steps = state.sync_gradients
    for i, one in enumerate(recorded):
        mine = slice(None) if recorder.kind.shared else slice(start, start + len(one.losses))
        start += len(one.losses)
        set_rng_state(one.rng_state, trainer.args.device)
        parts, extra = recorder.parts(one.batch, again=True)
        losses = torch.cat([part.losses for part in parts])[usable[mine]]
        # The engine averages over processes; and all of them have to call it, with losses or without.
        total = (weights[mine][usable[mine]].to(losses) * losses).sum() * process_count()
        if extra is not None:
            total = total + torch.where(extra.isfinite(), extra, 0) / recorder.micro_batches
        state._set_sync_gradients(steps and i == len(recorded) - 1)
        trainer.accelerator.backward(total, scale_wrt_gas=False)
    state._set_sync_gradients(steps)

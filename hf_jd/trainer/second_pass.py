"""Two passes: the weighted losses, computed again, through `accelerator.backward`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_jd.distributed.gradients import add_gradients
from hf_jd.gramian.random_streams import set_random_state
from hf_jd.trainer.gradients import accumulate, added, set_aside
from hf_jd.trainer.recording import Recorded, Recorder


def second_pass(recorder: Recorder, recorded: Sequence[Recorded], weights: Tensor, usable: Tensor) -> None:
    """Descends sum_k w_k loss_k, of losses computed again with the random numbers of their first pass.

    Args:
        recorder: Who recorded.
        recorded: The micro-batches of this process after their first pass.
        weights: [m] of this process's objectives.
        usable: [m] (bool); other losses or rows may be NaN, and are not touched.
    """
    trainer, engine, start = recorder.trainer, recorder.trainer.engine(), 0
    whole: list[dict[nn.Parameter, Tensor]] = []
    with set_aside(trainer.trainable()) as gradients:
        for first in recorded:
            mine = slice(None) if recorder.kind.shared else slice(start, start + len(first.losses))
            start += len(first.losses)
            with trainer.accelerator.no_sync(recorder.model):
                parts = first.parts
                if not recorder.keep_graph:
                    assert first.random_state is not None
                    set_random_state(first.random_state, trainer.args.device)
                    parts = recorder.parts(first.batch, again=True)[0]
                everything = torch.cat([part.losses for part in parts])
                losses = everything[usable[mine]]
                total = (weights[mine][usable[mine]].to(losses) * losses).sum()
                if engine.sharded:
                    # FSDP2's own reduction would keep what it is not to reduce, and add it to the next step.
                    whole += [engine.gradients(total * recorder.scale)] if len(losses) else []
                    engine.keep_up(everything.sum())
                elif len(losses):
                    trainer.accelerator.backward(total)
    accumulate(add_gradients(added([gradients, *whole]), trainer.trainable()))

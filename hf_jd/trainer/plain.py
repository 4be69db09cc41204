"""A step whose weights are known before: the weighted losses, backward, at the price of a plain step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_jd.distributed.gradients import add_gradients
from hf_jd.distributed.processes import add_over_processes, process_count
from hf_jd.gramian.random_streams import random_state
from hf_jd.trainer.gradients import accumulate, set_aside
from hf_jd.trainer.kept import Kept
from hf_jd.trainer.recording import Recorded
from hf_jd.trainer.weighing import keep_losses, multipliers

if TYPE_CHECKING:
    from hf_jd.trainer.update import Update


def plain_step(update: Update) -> Tensor | None:
    """Adds an update to `.grad` without rows: the gradient of the mean of c_k objective_k, with c_k of the control.

    Micro-batches go backward one by one where what the others count changes their coefficients by a common factor only.
    Otherwise the graphs of all of them are kept until then.

    Returns:
        The same as `Update.run`; None where something isn't finite, and the update has to be measured.
    """
    trainer, kept, extras = update.trainer, Kept(update.kind.shared), []
    with set_aside(update.trainable) as gradients, trainer.engine().paused():
        for batch in update.batches:
            found, extra = _forward(update, batch)
            extras += [] if extra is None else [extra / (update.micro_batches * process_count())]
            late = found.parts[0].denominators is None and (
                update.jd.own_mean or len(trainer.jd_loss_names) > 1 or trainer.has_extra
            )
            if not late:
                _descend(update, [multipliers(trainer, found.table()).to(found.losses) * found.losses, *extras[-1:]])
                found = found._replace(parts=[part.detached() for part in found.parts])
                extras = [value.detach() for value in extras]
            kept.add(found)
        table, _ = kept.joined()
        rows = update.rows(None)
        objectives = update.objectives(rows.table(table), table, kept.recorded[0])
        usable = objectives.usable(objectives.losses.diag())
        each = update.coefficients(objectives, usable)
        if late:
            known = (each * multipliers(trainer, objectives.table))[rows.mine]
            losses = [found.losses for found in kept.recorded]
            losses = torch.stack(losses).sum(0) if update.kind.shared else torch.cat(losses)
            _descend(update, [known.to(losses) * losses, *extras])
    if not late and not objectives.normalised and usable.any():
        common = each[usable][0].item()
        gradients = {p: common * gradient for p, gradient in gradients.items()}
    total = add_gradients(gradients, update.trainable)
    if add_over_processes(torch.stack([found.broken for found in kept.recorded]).sum()):
        return None
    if trainer.accelerator.scaler is None and not _finite(list(total.values())):
        return None
    accumulate(total)
    update.count_broken(kept.recorded, objectives, usable)
    keep_losses(trainer, objectives.joined(usable))
    return update.value(each, table, rows, usable, [value.detach() for value in extras])


def _forward(update: Update, batch: Mapping[str, Any]) -> tuple[Recorded, Tensor | None]:
    """A micro-batch without rows, with a graph, and what is in none of its objectives."""
    state = random_state(update.trainer.args.device)
    with update.trainer.accelerator.no_sync(update.recorder.model):
        parts, extra = update.recorder.parts(batch)
    broken = torch.stack([(~part.finite).sum() + part.broken for part in parts]).sum()
    return Recorded(batch, state, parts, None, broken, None), extra


def _descend(update: Update, losses: Sequence[Tensor]) -> None:
    total = torch.stack([loss.sum() for loss in losses]).sum()
    if total.requires_grad:
        with update.trainer.accelerator.no_sync(update.recorder.model):
            update.trainer.accelerator.backward(total)


def _finite(gradients: list[Tensor]) -> bool:
    return not gradients or bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())

"""One update: micro-batches -> rows -> Gramian -> weights -> `.grad`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_jd.collator import GROUP_KEY
from hf_jd.distributed.gradients import add_gradients
from hf_jd.distributed.processes import add_over_processes, gather_uneven, process_count
from hf_jd.distributed.rows import AddedRows, GatheredRows, OwnRows
from hf_jd.gramian import Jacobian
from hf_jd.objectives import OBJECTIVES, Objectives
from hf_jd.trainer.gradients import accumulate, added
from hf_jd.trainer.recording import Recorded, Recorder
from hf_jd.trainer.second_pass import second_pass
from hf_jd.trainer.weighing import signs, weigh

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin

logger = logging.get_logger(__name__)


class Update:
    """The objectives of some micro-batches, weighed together.

    Args:
        trainer: Whose model, arguments and losses these are.
        model: The model as Trainer has wrapped it.
        batches: The micro-batches of this process.
        num_items: How many tokens Trainer counted in the update, if it did.
    """

    def __init__(self, trainer: JDTrainerMixin, model: nn.Module, batches: list[Mapping[str, Any]], num_items: Any):
        self.trainer = trainer
        self.jd = trainer.jd_args
        self.batches = batches
        self.alone = self.jd.jd_scope == "micro_batch"
        self.micro_batches = trainer.current_gradient_accumulation_steps if self.alone else len(batches)
        # How many updates like this one are averaged, unless the losses already hold their share of the whole.
        self.parts = self.micro_batches * process_count() if self.alone else 1
        self.kind = OBJECTIVES[self.jd.jd_objectives]
        self.present = self._present_groups()
        # A second pass can walk the graph of one micro-batch again; those of several would not fit in memory.
        keep_graph = self.jd.jd_backward == "two_pass" and len(batches) == 1
        self.recorder = Recorder(
            trainer, model, num_items, self.micro_batches, self.present, self._rows_fit(), keep_graph
        )

    def run(self) -> Tensor:
        """Adds the update to `.grad`.

        Returns:
            The part of this process in the objectives' mean, times the number of processes, as Trainer logs it.
        """
        recorded = [self.recorder.record(batch) for batch in self.batches]
        own, rows = self._joined(recorded)
        objectives = Objectives(rows.table(own), self.jd.own_mean, recorded[0].part.denominator is not None)
        gramian = rows.gramian() / self.recorder.scale**2
        usable = objectives.usable(gramian)
        factors = objectives.factors(usable)
        share = 1 if objectives.normalised else 1 / self.parts
        broken = self._count_broken(recorded, objectives, usable)
        signed = factors * signs(self.trainer, objectives)
        weights = weigh(self.trainer, gramian, objectives, usable, signed) * signed * share
        if self.trainer.accelerator.scaler is not None and broken:
            # An overflow has to stay in `.grad`: GradScaler then skips the step and lowers its scale.
            accumulate({p: torch.full_like(p, torch.inf) for p in self.trainer.trainable()})
        elif self.jd.jd_backward == "one_pass":
            # GradScaler divides by its scale, which is in the rows.
            accumulate(rows.weighted_sum(weights, usable))
        else:
            second_pass(self.recorder, recorded, weights[rows.mine], usable[rows.mine])
        extra = self._add_extra(recorded)
        mean = (factors * share / usable.sum().clamp(min=1))[rows.mine] * own[:, 0]
        return (mean[usable[rows.mine]].sum().to(self.trainer.args.device) + extra) * process_count()

    def _add_extra(self, recorded: list[Recorded]) -> Tensor:
        """Adds the mean over micro-batches and processes of what no token or instance owns; its part of this process.

        Trainer adds the micro-batches' instead of averaging them, where the model normalises its other losses itself.
        """
        share = 1 / (self.micro_batches * process_count())
        extras = [r.extra for r in recorded if r.extra is not None]
        total = added({p: share * gradient for p, gradient in extra.gradients.items()} for extra in extras)
        if add_over_processes(torch.tensor(float(self.trainer.has_extra), device=self.trainer.args.device)):
            accumulate(add_gradients(total, self.trainer.trainable()))
        return sum((share * extra.value for extra in extras), torch.zeros((), device=self.trainer.args.device))

    def _count_broken(self, recorded: list[Recorded], objectives: Objectives, usable: Tensor) -> Tensor:
        """How many instances and objectives are left out because they aren't finite; the same on all processes."""
        instances = torch.stack([r.broken for r in recorded]).sum()
        rows = (objectives.counts > 0).logical_and(~usable).sum()
        broken = add_over_processes(instances + rows) if self.alone else add_over_processes(instances) + rows
        self.trainer.jd_metrics.add({"jd/non_finite": broken.double()})
        if self.trainer.accelerator.scaler is None:  # An overflow is how GradScaler finds its scale.
            self._report(objectives, usable)
            self.trainer.count_broken(bool(broken))
        return broken

    def _report(self, objectives: Objectives, usable: Tensor) -> None:
        """Logs the objectives whose loss is finite, and row isn't."""
        for k in (objectives.counts > 0).logical_and(~usable).nonzero().flatten().tolist():
            group = int(objectives.groups[k])
            named = f" (group `{self.trainer.group_name(group)}`)" if group >= 0 else ""
            step = self.trainer.state.global_step + 1
            logger.warning(f"Update {step}: the row of objective {k}{named} isn't finite, and is left out.")

    def _present_groups(self) -> Tensor | None:
        """The sorted ids [K] of the groups that are weighed together; None without a group column."""
        column = self.jd.jd_group_column
        if column is None:
            return None
        for batch in self.batches:
            if GROUP_KEY not in batch:
                raise ValueError(
                    f"An example has no group column `{column}`; its batch has {', '.join(f'`{k}`' for k in batch)}."
                )
            if (batch[GROUP_KEY] < 0).any():
                raise ValueError(
                    f"An example has no value in the group column `{column}`, or a name that is not among the groups "
                    f"{', '.join(f'`{name}`' for name in self.trainer.jd_group_names or [])}."
                )
        ids = torch.cat([batch[GROUP_KEY] for batch in self.batches]).to(self.trainer.args.device).unique()
        return ids if self.alone else gather_uneven(ids)[0].unique()

    def _rows_fit(self) -> bool:
        """Whether rows are kept as they are, or as the layers' inputs and gradients where those are smaller."""
        keep = self.jd.keep_rows()
        if isinstance(keep, bool):
            return keep
        instances = sum(len(next(iter(batch.values()))) for batch in self.batches)
        m = len(self.present) if self.kind.shared and self.present is not None else instances
        device = self.trainer.args.device
        if isinstance(keep, str):
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
            keep = free // 2
        return m * sum(p.nbytes for p in self.trainer.trainable()) <= keep

    def _joined(self, recorded: list[Recorded]) -> tuple[Tensor, OwnRows]:
        """The objectives of this process's micro-batches: their table [m, 4], and their rows."""
        tables = [r.part.table() for r in recorded]
        jacobians = [r.jacobian for r in recorded if r.jacobian is not None]
        if self.kind.shared:
            table = torch.cat([torch.stack(tables).sum(0)[:, :-1], tables[0][:, -1:]], dim=1)
            jacobian = reduce(add, jacobians) if jacobians else None
        else:
            table = torch.cat(tables)
            jacobian = Jacobian.cat(jacobians) if jacobians else None
        rows = OwnRows if self.alone else AddedRows if self.kind.shared else GatheredRows
        return table, rows(jacobian, self.trainer.trainable())

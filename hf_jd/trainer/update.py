"""One update: micro-batches -> rows -> Gramian -> weights -> `.grad`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_jd.batches import group_ids, holds_examples, row_count
from hf_jd.distributed.gradients import add_gradients
from hf_jd.distributed.processes import add_over_processes, anywhere, gather_uneven, process_count
from hf_jd.distributed.rows import AddedRows, GatheredRows, OwnRows
from hf_jd.gramian import Jacobian
from hf_jd.gramian.random_streams import random_state, set_random_state, unchanged_streams
from hf_jd.gramian.sharding import whole_bytes
from hf_jd.metrics import Metrics
from hf_jd.objectives import Objectives
from hf_jd.trainer.deepspeed import measured_model, second_pass_of_deepspeed
from hf_jd.trainer.gradients import accumulate, added
from hf_jd.trainer.kept import Kept, allowed, is_full
from hf_jd.trainer.plain import plain_step
from hf_jd.trainer.recording import Recorded, Recorder
from hf_jd.trainer.second_pass import second_pass
from hf_jd.trainer.weighing import signs, weigh
from hf_jd.trainer.zero3 import measuring

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin

logger = logging.get_logger(__name__)


class Weighed(NamedTuple):
    """An update after its first pass.

    Attributes:
        recorded: The micro-batches of this process.
        own: [m, 5] the table of their objectives.
        rows: Their rows, among those of all M objectives.
        objectives: What is known of these.
        usable: [M] (bool) those whose loss and row are finite.
        weights: [M], signs and factors included.
        broken: [] how many instances and objectives are left out.
    """

    recorded: list[Recorded]
    own: Tensor
    rows: OwnRows
    objectives: Objectives
    usable: Tensor
    weights: Tensor
    broken: Tensor


class Update:
    """The objectives of some micro-batches, weighed together.

    Args:
        trainer: Whose model, arguments and losses these are.
        model: The model as Trainer has wrapped it.
        batches: The micro-batches of this process.
        num_items: How many tokens Trainer counted in the update, if it did.
        alone: Whether they are weighed apart from the other micro-batches and processes.
    """

    def __init__(
        self, trainer: JDTrainerMixin, model: nn.Module, batches: list[Mapping[str, Any]], num_items: Any, alone: bool
    ):
        self.trainer = trainer
        self.model = model
        self.jd = trainer.jd_args
        # Of several processes, all have to run as many passes.
        self.batches = [b for b in batches if process_count() > 1 or trainer.splits_loss or holds_examples(b)]
        self.alone = alone
        self.trainable = trainer.trainable()  # The walk over all modules takes time.
        self.micro_batches = trainer.current_gradient_accumulation_steps if self.alone else len(batches)
        # How many updates like this one are averaged, unless the losses already hold their share of the whole.
        self.parts = self.micro_batches * process_count() if self.alone else 1
        self.kind = self.jd.kind
        self.budget = allowed(trainer)
        self.present = self._present_groups()
        self.recorder = self._make_recorder(num_items, len(batches))

    def _make_recorder(self, num_items: Any, micro_batches: int) -> Recorder:
        # A second pass can walk the graph of one micro-batch again; those of several would not fit in memory.
        keep_graph = self.jd.jd_backward == "two_pass" and micro_batches == 1 and not self.trainer.is_deepspeed_enabled
        measured = measured_model(self.trainer, self.model)
        return Recorder(
            self.trainer, measured, num_items, self.micro_batches, self.present, self._rows_fit(), keep_graph
        )

    def run(self) -> Tensor:
        """Adds the update to `.grad`.

        Returns:
            The part of this process in the objectives' mean, times the number of processes, as Trainer logs it.
        """
        device = self.trainer.args.device
        if not self.batches:
            return torch.zeros((), device=device)
        if not self.trainer.jd_control.measures(self.trainer.state.global_step):
            state = random_state(device)
            value = plain_step(self)
            if value is not None:
                return value
            set_random_state(state, device)
            self.recorder.again = True
        with measuring(self.model, self.trainer.engine()):
            start = time.perf_counter()
            kept = self._recorded()
            weighed = None if kept is None else self.weighed(kept, time.perf_counter() - start)
        if weighed is None:
            return self._apart()
        recorded, own, rows, objectives, usable, weights, broken = weighed
        if self.trainer.accelerator.scaler is not None and broken:
            # An overflow has to stay in `.grad`: GradScaler then skips the step and lowers its scale.
            accumulate({p: torch.full_like(p, torch.inf) for p in self.trainable})
        elif self.trainer.is_deepspeed_enabled:
            with unchanged_streams(device):
                second_pass_of_deepspeed(self.recorder, self.model, recorded, weights[rows.mine], usable[rows.mine])
        elif self.jd.jd_backward == "one_pass" or objectives.broken(usable).any():
            # Rows are picked; a second pass would multiply those that aren't finite by 0, which is NaN.
            # GradScaler divides by its scale, which is in the rows.
            accumulate(rows.weighted_sum(weights, usable))
        else:
            with unchanged_streams(device):
                second_pass(self.recorder, recorded, weights[rows.mine], usable[rows.mine])
        return self.value(self.coefficients(objectives, usable), own, rows, usable, self.add_extra(recorded))

    def weighed(self, kept: Kept, recording: float) -> Weighed:
        """The weights of what was recorded, which took so many seconds."""
        start, recorded = time.perf_counter(), kept.recorded
        own, jacobian = kept.joined()
        rows = self.rows(jacobian)
        objectives = self.objectives(rows.table(own), own, recorded[0])
        gramian = rows.gramian() / self.recorder.scale**2
        usable = objectives.usable(gramian)
        factors = objectives.factors(usable)
        broken = self.count_broken(recorded, objectives, usable)
        signed = factors * signs(self.trainer, objectives.groups)
        weights = weigh(self.trainer, gramian, objectives, usable, signed) * signed * self._share(objectives)
        self._keep_price(kept.nbytes, recording, time.perf_counter() - start)
        return Weighed(recorded, own, rows, objectives, usable, weights, broken)

    def _recorded(self) -> Kept | None:
        """The micro-batches after their first pass; None where their rows are too many and are to be weighed apart."""
        kept, state = Kept(self.kind.shared), random_state(self.trainer.args.device)
        for batch in self.batches:
            kept.add(self.recorder.record(batch))
            first = len(kept.recorded) == 1 < len(self.batches)
            if first and self.budget is not None and is_full(self.trainer, kept, len(self.batches), self.budget):
                set_random_state(state, self.trainer.args.device)
                return None
        return kept

    def _apart(self) -> Tensor:
        """The same micro-batches, each weighed by itself."""
        self.weigh_apart()
        values, state = [], self.trainer.accelerator.gradient_state
        steps = state.sync_gradients
        for i, batch in enumerate(self.batches):
            # DeepSpeed takes its step where this is set.
            state._set_sync_gradients(steps and i == len(self.batches) - 1)
            update = Update(self.trainer, self.model, [batch], self.recorder.num_items, alone=True)
            update.recorder.again = i == 0  # It has been recorded, and told how many rows there would be.
            values.append(update.run())
        state._set_sync_gradients(steps)
        return torch.stack(values).sum()

    def weigh_apart(self) -> None:
        """From now on each micro-batch is weighed by itself, as rows that are too many stay so."""
        if not self.trainer.jd_apart:
            logger.warning(
                "The rows of all micro-batches of an update are too many for --jd_keep_rows "
                f"{self.jd.jd_keep_rows}: each micro-batch is weighed by itself from now on, as --jd_when_full asks."
            )
        self.trainer.jd_apart = True

    def value(self, each: Tensor, own: Tensor, rows: OwnRows, usable: Tensor, extras: Sequence[Tensor]) -> Tensor:
        """The part of this process in the objectives' mean, times the number of processes, as Trainer logs it.

        Args:
            each: [M] the coefficients of the losses in that mean.
            own: [m, 5] the table of this process.
            rows: Which of the M rows are its own.
            usable: [M] (bool).
            extras: What no weighting sees, each [].
        """
        mine = usable[rows.mine]
        total = (each[rows.mine] * own[:, 0])[mine].sum().to(self.trainer.args.device)
        return sum(extras, total) * process_count()

    def coefficients(self, objectives: Objectives, usable: Tensor) -> Tensor:
        """[M] the coefficients of the losses in the objectives' mean."""
        return objectives.factors(usable) * self._share(objectives) / objectives.number(usable)

    def _share(self, objectives: Objectives) -> float:
        return 1.0 if objectives.normalised else 1 / self.parts

    def rows(self, jacobian: Jacobian | None) -> OwnRows:
        """This process's rows among those that are weighed together; None where it has none."""
        kind = OwnRows if self.alone else AddedRows if self.kind.shared else GatheredRows
        return kind(jacobian, self.trainable)

    def _keep_price(self, nbytes: int, recording: float, weighing: float) -> None:
        keys = ("jd/seconds/rows", "jd/seconds/weighing", "jd/megabytes/rows")
        price = torch.tensor([recording, weighing, nbytes / 1e6], dtype=torch.float64)
        self.trainer.jd_metrics.add(Metrics(keys, price))

    def add_extra(self, recorded: list[Recorded]) -> list[Tensor]:
        """Adds the mean over micro-batches and processes of what no token or instance owns; the parts of this process.

        Trainer adds the micro-batches' instead of averaging them, where the model normalises its other losses itself.
        """
        share = 1 / (self.micro_batches * process_count())
        extras = [r.extra for r in recorded if r.extra is not None]
        total = added({p: share * gradient for p, gradient in extra.gradients.items()} for extra in extras)
        if not self.trainer.is_deepspeed_enabled and anywhere(self.trainer.has_extra, self.trainer.args.device):
            accumulate(add_gradients(total, self.trainable))
        return [share * extra.value for extra in extras]

    def count_broken(self, recorded: list[Recorded], objectives: Objectives, usable: Tensor) -> Tensor:
        """How many instances and objectives are left out because they aren't finite; the same on all processes."""
        instances = torch.stack([r.broken for r in recorded]).sum()
        rows = objectives.broken(usable).sum()
        broken = add_over_processes(instances + rows) if self.alone else add_over_processes(instances) + rows
        self.trainer.check_own_losses()
        self.trainer.jd_metrics.add(Metrics(("jd/non_finite",), broken.double()[None]))
        if self.trainer.accelerator.scaler is None:  # An overflow is how GradScaler finds its scale.
            self._report(objectives, usable)
            self.trainer.count_broken(bool(broken))
        return broken

    def _report(self, objectives: Objectives, usable: Tensor) -> None:
        """Logs the objectives whose loss is finite, and row isn't."""
        for k in objectives.broken(usable).nonzero().flatten().tolist():
            group = int(objectives.groups[k])
            named = f" (group `{self.trainer.group_name(group)}`)" if group >= 0 else ""
            step = self.trainer.state.global_step + 1
            logger.warning(f"Update {step}: the row of objective {k}{named} isn't finite, and is left out.")

    def _present_groups(self) -> Tensor | None:
        """The sorted ids [K] of the groups that are weighed together; None without a group column."""
        column = self.jd.jd_group_column
        if column is None or not self.batches:
            return None
        each = []
        for batch in self.batches:
            groups = group_ids(batch)
            if groups is None:
                named = ", ".join(f"`{key}`" for key in batch) if isinstance(batch, Mapping) else "no names"
                raise ValueError(
                    f"An example has no group column `{column}`; its batch has {named}. (A collator that a DataLoader "
                    "of your own is given has to be `trainer.data_collator`.)"
                )
            if (groups < 0).any():
                raise ValueError(
                    f"An example has no value in the group column `{column}`, or a name that is not among the groups "
                    f"{', '.join(f'`{name}`' for name in self.trainer.jd_group_names or [])}."
                )
            each.append(groups)
        ids = torch.cat(each).to(self.trainer.args.device).unique()
        return ids if self.alone else gather_uneven(ids)[0].unique()

    def _rows_fit(self) -> bool:
        """Whether rows are kept as they are, or as the layers' inputs and gradients where those are smaller."""
        if self.budget is None:
            return self.jd.keep_rows() is True
        instances = sum(map(row_count, self.batches))
        m = len(self.present) if self.kind.shared and self.present is not None else instances
        return m * sum(whole_bytes(p) for p in self.trainable) <= self.budget

    def objectives(self, table: Tensor, own: Tensor, first: Recorded) -> Objectives:
        """What is known of the rows [M, 5] of all processes, from that and the table [m, 5] of this one."""
        if self.kind.shared:
            table = torch.cat([table[:, :3], own[:, 3:]], dim=1)  # Groups and names are the same everywhere.
        whole = len(self.trainer.jd_loss_names) - 1 if len(first.parts) > 1 and not self.kind.shared else None
        return Objectives(table, self.jd.own_mean, first.parts[0].denominators is not None, whole)

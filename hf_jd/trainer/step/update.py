"""One update: micro-batches -> rows -> Gramian -> weights -> `.grad`."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_jd.batches import row_count
from hf_jd.contradictions import listed
from hf_jd.distributed.gradients import add_gradients
from hf_jd.distributed.processes import add_over_processes, anywhere, gather_uneven, process_count
from hf_jd.distributed.rows import AddedRows, GatheredRows, LocalRows
from hf_jd.gramian.random_streams import unchanged_streams
from hf_jd.gramian.sharding import whole_bytes
from hf_jd.metrics import Metrics
from hf_jd.objectives import Objectives, ObjectiveTable
from hf_jd.trainer.gradients import accumulate, added, all_finite
from hf_jd.trainer.step.backward import Passed, Step
from hf_jd.trainer.step.hooks import check_hooks
from hf_jd.trainer.step.row_store import RowStore, allowed, is_full
from hf_jd.trainer.step.weighing import StepSettings, multipliers, plain_metrics, weigh

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin

logger = logging.get_logger(__name__)


class Update:
    """The objectives of some micro-batches, weighed together.

    Args:
        trainer: Provides the model, the arguments and the step.
        model: The model as wrapped by Trainer.
        batches: The micro-batches of this process, to `take` one by one.
        alone: Whether to weigh them separately from other micro-batches and processes.
    """

    def __init__(self, trainer: JDTrainerMixin, model: nn.Module, batches: list[Any], alone: bool):
        self.trainer, self.model, self.batches, self.alone = trainer, model, batches, alone
        self.jd, self.kind, self.backend = trainer.jd_args, trainer.jd_args.kind, trainer.jd_backend
        self.trainable = trainer.trainable()
        if not self.backend.owns_backward:  # DeepSpeed has hooks of its own.
            check_hooks(trainer, self.trainable)
        self.blocks = trainer.engine().block_names()
        self.budget = allowed(trainer)
        self.present = self._present_groups()
        self.measured = trainer.jd_control.measures(trainer.state.global_step)
        self.two_passes = self.jd.jd_backward == "two_pass"
        # A second pass can reuse the graph of a single micro-batch; several graphs would not fit in memory.
        keep_graph = self.two_passes and len(batches) == 1 and not self.backend.owns_backward
        self.recorder = trainer.recorder_class(trainer, model, self.present, self._rows_fit(), keep_graph)
        self.store = RowStore(self.kind.shared)
        self.measuring = ExitStack()
        self.seconds = 0.0
        # the loss to log, if Trainer's step can't compute it
        self.logged: Tensor | None = None
        # only set in an update that isn't measured
        self.passed: list[Passed] = []
        self.gradients: list[dict[nn.Parameter, Tensor]] = []

    def take(self, batch: Any, step: Step) -> Tensor:
        """Run Trainer's own step on a micro-batch, and store its rows, or its gradient if the weights are known.

        Args:
            batch: As collated.
            step: The step.

        Returns:
            The step's value, for Trainer's log.
        """
        if not self.measured and not self.kind.of_batches:
            with self.trainer.engine().paused():
                value, calls = self.recorder.run(batch, step, self._descend_now)
            if len(calls) > 1:
                raise self.recorder.called_several_times(len(calls))
            return value
        start = time.perf_counter()
        record = self.recorder.whole if self.kind.of_batches else self.recorder.record
        if not self.store.recorded:  # Parameters are gathered once per update.
            self.measuring.enter_context(self.backend.measuring(self.model))
        value, recorded = record(batch, step)
        self.store.add(recorded)
        self.seconds += time.perf_counter() - start
        first = len(self.store.recorded) == 1 < len(self.batches)
        if first and self.budget is not None and is_full(self.trainer, self.store, len(self.batches), self.budget):
            self.alone = True
            self.weigh_apart()
        return value

    @contextmanager
    def measuring_unless_raised(self) -> Generator[None]:
        """Restore the model if an error ends the update."""
        try:
            yield
        except BaseException:
            self.measuring.close()
            raise

    def finish(self) -> None:
        """Add the update to `.grad`."""
        if not self.store.recorded and not self._descend():
            self._measure_again()
        if self.store.recorded:
            self._weigh()

    def _weigh(self) -> None:
        """Weigh the recorded rows, and add the update to `.grad`."""
        start, recorded = time.perf_counter(), self.store.recorded
        table, jacobian = self.store.joined()
        rows = self._rows(jacobian)
        table = rows.exchange(table)
        gramians = rows.gramians() / self.recorder.scale**2
        self.measuring.close()
        objectives = self._objectives(table, gramians.sum(0).diagonal().isfinite(), recorded[0].normalised)
        broken = self._count_broken(torch.stack([r.broken for r in recorded]).sum(), objectives)
        result = weigh(gramians, objectives, self._settings())
        weights = result.weights * self._share(objectives)
        self.trainer.jd_state = result.state or self.trainer.jd_state
        for metrics in result.metrics:
            self.trainer.jd_metrics.add(metrics)
        self._keep_price(time.perf_counter() - start)
        self._log_of_sums(objectives, rows)
        if self.trainer.accelerator.scaler is not None and broken:
            # An overflow has to stay in `.grad`: GradScaler then skips the step and lowers its scale.
            accumulate({p: torch.full_like(p, torch.inf) for p in self.trainable})
        elif self.backend.owns_backward:
            self._second_pass_of_backend(weights[0, rows.local], objectives.usable[rows.local])
        elif not self.two_passes or objectives.broken.any():
            # Pick rows: a second pass would multiply nonfinite ones by 0, which is NaN. The rows include GradScaler's
            # scale, by which it divides.
            accumulate(rows.weighted_sum(weights, objectives.usable))
        else:
            self._second_pass(weights[0, rows.local])
        if not self.backend.owns_backward and anywhere(self.recorder.has_rest, self.trainer.args.device):
            accumulate(add_gradients(added(r.extra for r in recorded), self.trainable))

    def _second_pass(self, weights: Tensor) -> None:
        """Compute the losses again, and descend their weighted sum; see `_weigh`."""
        first, gradients = self._first_passes(), []
        with unchanged_streams(self.trainer.args.device):
            for passed, each in zip(first, self._by_micro_batch(weights, first), strict=True):
                again = passed if self.recorder.keep_graph else self.recorder.again(passed, self.recorder.model)
                gradients.append(self._gradient(again, each, rest=False))
        accumulate(add_gradients(added(gradients), self.trainable))

    def _second_pass_of_backend(self, weights: Tensor, usable: Tensor) -> None:
        """Do the same with a backend that owns the backward pass, without instances of nonfinite gradients."""
        first = self._first_passes()
        each = (self._by_micro_batch(values, first) for values in (weights, usable))
        losses = [partial(self._loss_again, *of_batch) for of_batch in zip(first, *each, strict=True)]
        with unchanged_streams(self.trainer.args.device):
            self.backend.descend(losses)

    def _loss_again(self, passed: Passed, weights: Tensor, usable: Tensor) -> Tensor:
        finite = self._finite_instances(passed, usable)
        again = self.recorder.again(passed, self.model, finite)
        by_instance = passed.members.segments if finite is None else passed.members.segments[finite]
        again.members = passed.members._replace(segments=by_instance)
        return again.shares.weighted(weights, again.members, rest=True)

    def _finite_instances(self, passed: Passed, usable: Tensor) -> Tensor | None:
        """Return the instances [B] (bool) whose loss and row are finite; None if all are."""
        segments = passed.members.segments
        broken = passed.table.counts.to(segments.device).bool() & ~usable.to(segments.device)
        out = ~passed.shares.finite.all(1)
        if broken.any():
            out = out | (segments >= 0) & broken[segments.clamp(min=0)]
        return ~out if out.any() and not out.all() else None

    def _first_passes(self) -> list[Passed]:
        return [recorded.passed for recorded in self.store.recorded if recorded.passed is not None]

    def _by_micro_batch(self, of_rows: Tensor, passed: Sequence[Passed]) -> Sequence[Tensor]:
        """Split the values of this process's rows [m] by micro-batch."""
        return [of_rows] * len(passed) if self.kind.shared else of_rows.split([len(p.table) for p in passed])

    def _descend_now(self, passed: Passed) -> None:
        """Descend a micro-batch of known weights, unless they depend on the other micro-batches' counts."""
        passed.shares.normalised = passed.shares.normalised and not self.jd.own_mean
        if passed.shares.normalised:
            self.gradients.append(self._gradient(passed, self._multipliers(passed.table), rest=True))
            self.recorder.shown.add(self.gradients[-1])
        self.recorder.has_rest |= passed.shares.rest is not None
        self.passed.append(passed)

    def _gradient(self, passed: Passed, weights: Tensor, rest: bool) -> dict[nn.Parameter, Tensor]:
        """Return the gradient of the weighted sum of a micro-batch's objectives, and free the graph."""
        gradient = self.backend.gradient(passed.shares.weighted(weights, passed.members, rest))
        passed.shares.release()
        return gradient if passed.table.counts.any() else {}

    def _descend(self) -> bool:
        """Add the gradient of losses of known weights to `.grad`; return False if it isn't finite."""
        first = self.passed[0].shares
        table = (ObjectiveTable.added if self.kind.shared else ObjectiveTable.cat)([p.table for p in self.passed])
        rows = self._rows(None)
        table = rows.exchange(table)
        objectives = self._objectives(table, torch.ones_like(table.counts, dtype=torch.bool), first.normalised)
        if not first.normalised:
            each = (self._mean_weights(objectives) * self._multipliers(table))[rows.local]
            for passed, weights in zip(self.passed, self._by_micro_batch(each, self.passed), strict=True):
                self.gradients.append(self._gradient(passed, weights, rest=True))
        total = add_gradients(added(self.gradients), self.trainable)
        if self.trainer.accelerator.scaler is None and not all_finite(list(total.values())):
            return False
        accumulate(total)
        self._count_broken(torch.stack([p.broken for p in self.passed]).sum(), objectives)
        self._log_of_sums(objectives, rows)
        for metrics in plain_metrics(objectives.joined(), self._settings()):
            self.trainer.jd_metrics.add(metrics)
        return True

    def _measure_again(self) -> None:
        """Record the rows of micro-batches whose plain gradient wasn't finite."""
        with unchanged_streams(self.trainer.args.device):
            for passed in self.passed:
                recorded = self.recorder.rows(self.recorder.again(passed, self.recorder.model))
                self.store.add(recorded._replace(broken=torch.maximum(recorded.broken, passed.broken)))

    def _log_of_sums(self, objectives: Objectives, rows: LocalRows) -> None:
        """Make Trainer log this process's part of losses that are only divided at the end of the update."""
        if objectives.normalised or self.jd.own_mean or self.recorder.has_rest:
            return
        each = self._mean_weights(objectives) * objectives.table.losses
        together = self.kind.shared and not self.alone
        self.logged = each[rows.local][objectives.usable[rows.local]].sum() * (1 if together else process_count())

    def weigh_apart(self) -> None:
        """Weigh each micro-batch separately from now on: rows that don't fit won't fit later."""
        if not self.trainer.jd_apart:
            logger.warning(
                "The rows of all micro-batches of an update are too many for --jd_keep_rows "
                f"{self.jd.jd_keep_rows}: each micro-batch is weighed separately from now on, as set by --jd_when_full."
            )
        self.trainer.jd_apart = True

    def _rows(self, jacobian: Any) -> LocalRows:
        """Return this process's share of the rows to weigh together."""
        kind = LocalRows if self.alone or process_count() == 1 else AddedRows if self.kind.shared else GatheredRows
        return kind(jacobian, self.trainable, self.blocks)

    def _objectives(self, table: ObjectiveTable, finite: Tensor, normalised: bool) -> Objectives:
        apart = self.jd.jd_extra_losses == "objective" and not self.kind.shared
        whole = len(self.trainer.jd_loss_names) - 1 if apart else None
        return Objectives(table, finite.to(table.counts.device), self.jd.own_mean, normalised, whole)

    def _settings(self) -> StepSettings:
        trainer, step = self.trainer, self.trainer.state.global_step
        return StepSettings(
            self.kind,
            trainer.jd_loss_names,
            trainer.group_name,
            self.jd.jd_ascend or [],
            partial(trainer.jd_control.weights, step=step),
            list(dict.fromkeys((self.blocks or {}).values())),
        )

    def _multipliers(self, table: ObjectiveTable) -> Tensor:
        multiplier = partial(self.trainer.jd_control.multiplier, step=self.trainer.state.global_step)
        return multipliers(table, self._settings(), multiplier)

    def _mean_weights(self, objectives: Objectives) -> Tensor:
        """Return the weights [M] of the rows in the mean of the objectives."""
        return objectives.factors * self._share(objectives) / objectives.number

    def _share(self, objectives: Objectives) -> float:
        """Return the share of this update in the whole, unless the losses already include it."""
        alone = self.alone and not objectives.normalised
        return 1 / (self.trainer.current_gradient_accumulation_steps * process_count()) if alone else 1.0

    def _keep_price(self, weighing: float) -> None:
        keys = ("jd/seconds/rows", "jd/seconds/weighing", "jd/megabytes/rows")
        price = torch.tensor([self.seconds, weighing, self.store.nbytes / 1e6], dtype=torch.float64)
        self.trainer.jd_metrics.add(Metrics(keys, price))

    def _count_broken(self, instances: Tensor, objectives: Objectives) -> Tensor:
        """Count instances and objectives that are left out because they aren't finite; the same on all processes."""
        rows = objectives.broken.sum()
        broken = add_over_processes(instances + rows) if self.alone else add_over_processes(instances) + rows
        self.trainer.jd_metrics.add(Metrics(("jd/non_finite",), broken.double()[None]))
        if self.trainer.accelerator.scaler is None:  # GradScaler needs overflows to find its scale
            self._report(objectives)
            self.trainer.count_broken(bool(broken))
        return broken

    def _report(self, objectives: Objectives) -> None:
        """Log the objectives with a finite loss, but a row that isn't finite."""
        for k in objectives.broken.nonzero().flatten().tolist():
            group = int(objectives.table.groups[k])
            named = f" (group `{self.trainer.group_name(group)}`)" if group >= 0 else ""
            step = self.trainer.state.global_step + 1
            logger.warning(f"Update {step}: the row of objective {k}{named} isn't finite, and is left out.")

    def _present_groups(self) -> Tensor | None:
        """Return the sorted ids [G] of the groups that are weighed together; None without a group column."""
        column = self.jd.jd_group_column
        if column is None:
            return None
        each = []
        for batch in self.batches:
            groups = self.trainer.groups_before(batch)
            if groups is None:
                named = listed(batch) if hasattr(batch, "keys") else "no names"
                raise ValueError(
                    f"An example has no group column `{column}`; its batch has {named}. (Your own DataLoader has to "
                    "use `trainer.data_collator`.)"
                )
            if (groups < 0).any():
                raise ValueError(
                    f"An example has no value in the group column `{column}`, or a name that is not among the groups "
                    f"{listed(self.trainer.jd_group_names or [])}."
                )
            each.append(groups)
        ids = torch.cat(each).to(self.trainer.args.device).unique()
        return ids if self.alone else gather_uneven(ids)[0].unique()

    def _rows_fit(self) -> bool:
        """Return whether rows fit; if not, the layers' inputs and gradients are stored instead, where smaller."""
        if self.budget is None:
            return self.jd.keep_rows() is True
        instances = sum(row_count(batch) or 1 for batch in self.batches)
        m = len(self.present) if self.kind.shared and self.present is not None else instances
        return m * sum(whole_bytes(p) for p in self.trainable) <= self.budget

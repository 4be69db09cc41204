"""One micro-batch: run Trainer's own step, and turn its loss into rows.

Trainer's step ends in `accelerator.backward(loss)`. That call is replaced: the loss is split by instance
(`splitting/`), so any `compute_loss` works unchanged, with its own metrics and scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_jd.batches import selected, stand_in, without_groups
from hf_jd.distributed.processes import anywhere
from hf_jd.gramian import Jacobian
from hf_jd.gramian.random_streams import RandomState, set_random_state
from hf_jd.gramian.rows import DenseRows
from hf_jd.objectives import Membership, ObjectiveTable, membership
from hf_jd.trainer.gradients import ShownGradients, added, set_aside
from hf_jd.trainer.overrides import has_user_step
from hf_jd.trainer.splitting.cut import Contents, shares_of
from hf_jd.trainer.splitting.shares import Shares, at
from hf_jd.trainer.splitting.values import part_of_router
from hf_jd.trainer.step.metrics_of_trl import unchanged_metrics

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin

logger = logging.get_logger(__name__)

T = TypeVar("T")

Step = Callable[[nn.Module, Any], Tensor]
"""Trainer's own step, for a model and a batch without group ids; returns the value to log."""


@dataclass
class Passed:
    """A micro-batch after a forward pass.

    Attributes:
        batch: As collated; zeros if it held no example.
        contents: The groups, examples and documents of the batch.
        inputs: The batch as Trainer prepared it.
        streams: The random streams' state before the forward, if a second pass may follow.
        shares: The instances' shares of the loss.
        members: The objectives of the instances.
        table: The objectives' losses, counts and labels, including the rest of the loss if that is an objective.
        broken: [] the number of instances, and losses of the whole batch, left out because they aren't finite.
    """

    batch: Any
    contents: Contents
    inputs: Any
    streams: RandomState | None
    shares: Shares
    members: Membership
    table: ObjectiveTable
    broken: Tensor


class Recorded(NamedTuple):
    """A micro-batch after its rows are recorded.

    Attributes:
        table: Its objectives' losses, counts and labels.
        jacobian: Their rows, times GradScaler's scale; None if there are none.
        broken: See `Passed`.
        normalised: Whether rows are shares of Trainer's loss, not sums.
        extra: The gradient of the part of the loss that belongs to no instance and that no weighting sees, if any.
        passed: The micro-batch, for a second pass; None if the whole batch is one objective.
    """

    table: ObjectiveTable
    jacobian: Jacobian | None
    broken: Tensor
    normalised: bool
    extra: dict[nn.Parameter, Tensor]
    passed: Passed | None


class Recorder:
    """A runner of one update's micro-batches, which turns their losses into rows.

    Args:
        trainer: The trainer whose step to run.
        model: The model as wrapped by Trainer.
        present: [G] the sorted ids of the groups that are weighed together; None without a group column.
        materialise: Whether to form rows even if the layers' inputs and gradients are smaller.
        keep_graph: Whether to retain the graph of the losses.

    Attributes:
        scale: GradScaler's scale, which multiplies the rows.
        has_rest: Whether a loss had a part that belongs to no instance.
        shown: What `.grad` is during a user's own step.
    """

    def __init__(
        self, trainer: JDTrainerMixin, model: nn.Module, present: Tensor | None, materialise: bool, keep_graph: bool
    ):
        self.trainer, self.backend = trainer, trainer.jd_backend
        self.model = self.backend.measured(model)
        self.present, self.materialise, self.keep_graph = present, materialise, keep_graph
        self.kind = trainer.jd_args.kind
        scaler = trainer.accelerator.scaler
        self.scale = 1.0 if scaler is None else scaler.get_scale()
        self.has_rest = False
        whole = not (self.backend.shards or self.backend.owns_backward)
        self.shown = ShownGradients(whole and has_user_step(trainer))

    def record(self, batch: Any, step: Step) -> tuple[Tensor, Recorded]:
        """Run Trainer's own step on a micro-batch, and turn its loss into rows.

        Args:
            batch: As collated.
            step: The step.

        Returns:
            The step's value, for Trainer's log; and the rows.

        Raises:
            ValueError: The step called no `accelerator.backward`, or its losses can't be split.
        """

        def backward(passed: Passed) -> Recorded:
            recorded = self.rows(passed)
            if self.shown.active and recorded.normalised and recorded.jacobian is not None:
                ones = torch.ones(len(recorded.jacobian), dtype=torch.float64, device=recorded.broken.device)
                self.shown.add(added([recorded.jacobian.weighted_sum(ones), recorded.extra]))
            return recorded

        value, recorded = self.run(batch, step, backward)
        return value, recorded[0] if len(recorded) == 1 else self._joined(recorded)

    def run(self, batch: Any, step: Step, backward: Callable[[Passed], T]) -> tuple[Tensor, list[T]]:
        """Run the step with another backward in place of accelerate's.

        Returns:
            The step's value, and those of the backward: the step may call it several times.
        """
        trainer = self.trainer
        contents = Contents.of(batch, trainer.jd_args.jd_packed, trainer.args.device)
        batch = stand_in(batch) if contents.empty else batch
        with set_aside(trainer.trainable(), self.shown.sums) as gradients:
            value, results = self._step(batch, step, lambda loss: backward(self._passed(batch, contents, loss)))
        if self.shown.differ_from(gradients):
            raise ValueError(
                f"{type(trainer).__name__} ran its own backward pass, past accelerator.backward, or changed `.grad` in "
                "its training_step, so the gradient can't be split by instance: use torch.autograd.grad for it, add up "
                "the losses, change `.grad` in a TrainerCallback's on_pre_optimizer_step, or choose --jd_objectives "
                "batch, which makes each batch one objective."
            )
        return torch.zeros_like(value) if contents.empty else value, results

    def whole(self, batch: Any, step: Step) -> tuple[Tensor, Recorded]:
        """Run the step on a micro-batch that is one objective: its row is its gradient, over all of its passes."""

        def backward(loss: Tensor) -> Tensor:
            loss.backward(retain_graph=self.trainer.jd_retain_graph)
            return loss.detach().isfinite()[None]

        before = self.shown.sums
        shown = {p: gradient.clone() for p, gradient in before.items()}  # A backward adds to it in place.
        with self.trainer.engine().paused(), set_aside(self.trainer.trainable(), shown) as gradients:
            value, each = self._step(batch, step, backward)
        if self.shown.active:
            self.shown.sums = gradients
            gradients = {p: g - before[p] if p in before else g for p, g in gradients.items()}
        finite = torch.stack(each).all(0)
        unknown, name = finite.double() * torch.nan, finite.long() * 0
        table = ObjectiveTable(unknown, unknown, finite.double(), name - 1, name)
        jacobian = self.jacobian_of(gradients if finite else {})
        return value, Recorded(table, jacobian, (~finite).sum(), True, {}, None)

    def again(self, first: Passed, model: nn.Module, keep: Tensor | None = None) -> Passed:
        """Run a micro-batch forward once more, with the random numbers of its first pass.

        Args:
            first: The result of the first pass.
            model: The model to run.
            keep: [B] (bool) the instances to run; None for all.
        """
        trainer, batch, inputs = self.trainer, first.batch, first.inputs
        if first.streams is None:
            raise ValueError(
                f"The training step of {type(trainer).__name__} has to be run once more, which isn't possible since it "
                "does not call `_prepare_inputs`: leave --jd_backward at one_pass, and check the losses of the batch."
            )
        if keep is not None:
            batch, inputs = (selected(part, keep, first.contents.documents) for part in (batch, inputs))
        set_random_state(first.streams, trainer.args.device)
        trainer.jd_outputs.begin(batch)
        trainer.jd_inputs = inputs
        with unchanged_metrics(trainer), trainer.accelerator.no_sync(model), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, copy(inputs), num_items_in_batch=trainer.jd_items)
        contents = (
            first.contents
            if first.contents.empty
            else Contents.of(batch, trainer.jd_args.jd_packed, trainer.args.device)
        )
        passed = self._passed(batch, contents, loss, first.streams)
        # The sizes of the first pass include all that Trainer's step does to a loss.
        passed.shares.like(first.shares, keep)
        return passed

    def rows(self, passed: Passed) -> Recorded:
        """Compute the rows of a micro-batch's objectives; free its graph, unless it has to be retained."""
        engine, shares = self.trainer.engine(), passed.shares
        rest = shares.rest
        self.has_rest |= rest is not None
        apart = self.trainer.jd_args.jd_extra_losses == "objective"
        extra, keep_graph = {}, self.keep_graph or self.trainer.jd_retain_graph
        if rest is not None and not apart and not self.backend.owns_backward:
            extra = engine.gradients(rest)
        objectives = len(passed.members.groups) // shares.names
        parts = [self._rows_of_instances(passed, objectives, keep_graph or (apart and rest is not None))]
        if apart:
            alone = None
            if rest is not None and passed.table.counts[-1] > 0:
                segments = torch.zeros(shares.instances, dtype=torch.int64, device=rest.device)
                alone = engine.compute_jacobian(rest[None], segments, self.materialise, keep_graph)
            parts.append(alone or self._no_rows(1))
        if not self.keep_graph:
            shares.release()
        jacobians = [jacobian for jacobian in parts if jacobian is not None]
        jacobian = Jacobian.cat(jacobians) if jacobians else None
        return Recorded(passed.table, jacobian, passed.broken, shares.normalised, extra, passed)

    def _rows_of_instances(self, passed: Passed, objectives: int, retain_graph: bool) -> Jacobian | None:
        engine, shares, segments = self.trainer.engine(), passed.shares, passed.members.segments
        if shares.in_parts and shares.some.any():
            return self._rows_of_parts(shares, segments, objectives, retain_graph)
        losses = shares.surrogates(segments, objectives)
        if not shares.some.any():
            engine.keep_up(losses.sum())
            return self._no_rows(len(losses))
        if shares.names > 1:
            losses = losses.view(shares.names, -1).T
        if not self.keep_graph:
            shares.pieces = []  # frees the logits' gradients along the way
        of_rows = segments if passed.contents.documents is None else at(segments, passed.contents.documents)
        return engine.compute_jacobian(losses, of_rows, self.materialise, retain_graph)

    def _rows_of_parts(self, shares: Shares, segments: Tensor, objectives: int, retain_graph: bool) -> Jacobian:
        """Compute the rows of a batch whose parts the model was called on, part by part."""
        parts = []
        for pieces in shares.parts():
            losses = shares.surrogates(segments, objectives, pieces)
            of_rows = segments[pieces[0].owner]
            parts.append(self.trainer.engine().compute_jacobian(losses, of_rows, self.materialise, retain_graph))
        return reduce(add, parts)

    def _no_rows(self, objectives: int) -> Jacobian | None:
        return self.jacobian_of({}, objectives) if objectives else None

    def jacobian_of(self, gradients: Mapping[nn.Parameter, Tensor], objectives: int = 1) -> Jacobian:
        """Return the row of one objective from its gradient; without a gradient, rows of zeros, of any number."""
        rows = {p: DenseRows(g.reshape(1, -1), p.shape) for p, g in gradients.items()}
        trainer = self.trainer
        return Jacobian({p: rows.get(p) for p in trainer.trainable()}, objectives, trainer.engine().block_names())

    def _step(self, batch: Any, step: Step, backward: Callable[[Tensor], T]) -> tuple[Tensor, list[T]]:
        trainer, results = self.trainer, []
        trainer.jd_outputs.begin(batch)
        trainer.jd_inputs = trainer.jd_streams = trainer.jd_unreduced = None
        trainer.jd_backward = lambda loss: results.append(backward(loss))
        try:
            with trainer.accelerator.no_sync(self.model):
                value = step(self.model, without_groups(batch))
        finally:
            trainer.jd_backward = None
        if not results:
            raise ValueError(
                f"The training step of {type(trainer).__name__} didn't call accelerator.backward: call it, or "
                "super().training_step."
            )
        return value, results

    def _joined(self, parts: Sequence[Recorded]) -> Recorded:
        """Add up the rows of several losses of one micro-batch."""
        two_passes = self.backend.owns_backward or self.trainer.jd_args.jd_backward == "two_pass"
        if two_passes or not _alike(parts):
            raise self.called_several_times(len(parts))
        jacobians = [recorded.jacobian for recorded in parts if recorded.jacobian is not None]
        return parts[0]._replace(
            table=ObjectiveTable.added([recorded.table for recorded in parts]),
            jacobian=reduce(add, jacobians) if jacobians else None,
            broken=torch.stack([recorded.broken for recorded in parts]).max(),
            extra=added(recorded.extra for recorded in parts),
        )

    def called_several_times(self, times: int) -> ValueError:
        """Return the error for a step whose losses of one micro-batch don't add up."""
        return ValueError(
            f"The training step of {type(self.trainer).__name__} called accelerator.backward {times} times for one "
            "batch. Their rows can only be added up if all calls have losses of the same examples, with --jd_backward "
            "one_pass, without --jd_every, --jd_warmup_steps and --jd_monitor_every: call it once, with the sum of "
            "the losses."
        )

    def _passed(self, batch: Any, contents: Contents, loss: Tensor, streams: RandomState | None = None) -> Passed:
        """Split the loss of a micro-batch, and assign the shares to objectives."""
        trainer, last = self.trainer, self.trainer.jd_outputs.last
        if trainer.jd_groups_of_batch is not None:
            contents = Contents(trainer.jd_groups_of_batch, len(trainer.jd_groups_of_batch), None)
        shares, names = shares_of(trainer, loss * (self.scale / self.backend.divisor()), contents, self.scale)
        broken = self._take_out_broken(shares, contents)
        groups = contents.groups
        if contents.empty and self.present is not None:
            groups = self.present[:1].expand(shares.instances)
        first, streams = streams is None, trainer.jd_streams if streams is None else streams
        members = membership(self.kind, shares.some, groups, self.present)
        table = _table(shares, members)
        if trainer.jd_args.jd_extra_losses == "objective":
            table = ObjectiveTable.cat([table, self._row_of_rest(loss, shares, last)])
            names = [*names, trainer.name_of_rest(last)]
        elif shares.rest is not None:
            trainer.tell_of_rest()
        if not loss.isfinite():
            shares.rest = None
        trainer.keep_loss_names(names, bool(shares.some.any()))
        passed = Passed(batch, contents, trainer.jd_inputs, streams, shares, members, table, broken)
        if shares.unreduced and first:
            return self._without_broken(passed)
        return passed

    def _without_broken(self, passed: Passed) -> Passed:
        """Run a batch again without instances of nonfinite unreduced loss, whose backward may multiply 0 by NaN."""
        finite = passed.shares.finite.all(1)
        some = bool(finite.any() and not finite.all()) and not passed.contents.empty
        # If forwards gather parameters, all processes have to run the same number.
        if not (anywhere(some, finite.device) if self.backend.shards else some):
            return passed
        return replace(self.again(passed, self.model, finite if some else None), broken=passed.broken)

    def _row_of_rest(self, loss: Tensor, shares: Shares, last: Any) -> ObjectiveTable:
        """Return the table [1] of the part of the loss that belongs to no instance."""
        router = part_of_router(self.trainer, last)
        value = loss.detach().double()[None] * (torch.nan if router is None else router)
        raw = value if router is None else last["loss"].detach().double()[None] * router
        count = torch.full_like(value, shares.rest is not None and bool(loss.isfinite()))
        name = torch.full_like(value, shares.names, dtype=torch.int64)
        return ObjectiveTable(value / self.backend.divisor(), raw, count, torch.full_like(name, -1), name)

    def _take_out_broken(self, shares: Shares, contents: Contents) -> Tensor:
        """Remove nonfinite instances and losses from all objectives, and log them; return their number."""
        losses = shares.drop_broken_losses()
        broken = ~shares.finite.all(1) & (not contents.empty)
        if broken.any():
            shares.take_out(broken)
            step = self.trainer.state.global_step + 1
            for i in broken.nonzero().flatten().tolist():
                group = (
                    "" if contents.groups is None else f" (group `{self.trainer.group_name(int(contents.groups[i]))}`)"
                )
                logger.warning(f"Update {step}: instance {i}{group} has a loss that isn't finite, and is left out.")
        return broken.sum() + losses


def _alike(parts: Sequence[Recorded]) -> bool:
    """Return whether the rows of several losses of one micro-batch are shares of the same instances."""
    segments = [recorded.passed.members.segments for recorded in parts if recorded.passed is not None]
    same = all(torch.equal(each, segments[0]) for each in segments)
    return parts[0].normalised and same and len(segments) == len(parts)


def _table(shares: Shares, members: Membership) -> ObjectiveTable:
    """Build the table of a micro-batch's objectives; losses are NaN if values are unknown."""
    counts = members.added(shares.counts)
    if shares.values is None:
        sums = parts = torch.full_like(counts, torch.nan, dtype=torch.float64)
    else:
        sums, parts = (members.added(v.masked_fill(~shares.some, 0)) for v in (shares.values.sums, shares.values.parts))
    return ObjectiveTable(parts, sums, counts.double(), members.groups, members.names)

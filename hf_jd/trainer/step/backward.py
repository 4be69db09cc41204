"""One micro-batch: run Trainer's own step, and turn its loss into rows.

Trainer's step ends in `accelerator.backward(loss)`. That call is replaced: the loss is split by instance
(`splitting/`), so any `compute_loss` works unchanged, with its own metrics and scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
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
from hf_jd.trainer.gradients import set_aside
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

    def record(self, batch: Any, step: Step) -> tuple[Tensor, Recorded]:
        """Run Trainer's own step on a micro-batch, and turn its loss into rows.

        Args:
            batch: As collated.
            step: The step.

        Returns:
            The step's value, for Trainer's log; and the rows.

        Raises:
            ValueError: The step didn't call `accelerator.backward` once, or its loss can't be split.
        """
        with set_aside(self.trainer.trainable()) as past:
            value, recorded = self.run(batch, step, self.rows)
        if any(bool(gradient.any()) for gradient in past.values()):
            raise ValueError(
                f"{type(self.trainer).__name__} ran its own backward pass, past accelerator.backward, which left "
                "gradients that can't be split by instance: use torch.autograd.grad for them, add up the losses, or "
                "choose --jd_objectives batch, which makes each batch one objective."
            )
        return value, recorded

    def run(self, batch: Any, step: Step, backward: Callable[[Passed], T]) -> tuple[Tensor, T]:
        """Run the step with another backward in place of accelerate's; return the values of both."""
        trainer = self.trainer
        contents = Contents.of(batch, trainer.jd_args.jd_packed, trainer.args.device)
        batch = stand_in(batch) if contents.empty else batch
        value, result = self._step(batch, step, lambda loss: backward(self._passed(batch, contents, loss)))
        return torch.zeros_like(value) if contents.empty else value, result

    def whole(self, batch: Any, step: Step) -> tuple[Tensor, Recorded]:
        """Run the step on a micro-batch that is one objective: its row is its gradient, over all of its passes."""

        def backward(loss: Tensor) -> Tensor:
            loss.backward()
            return loss.detach().isfinite()[None]

        with self.trainer.engine().paused(), set_aside(self.trainer.trainable()) as gradients:
            value, finite = self._step(batch, step, backward)
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
        extra = {}
        if rest is not None and not apart and not self.backend.owns_backward:
            extra = engine.gradients(rest)
        objectives = len(passed.members.groups) // shares.names
        parts = [self._rows_of_instances(passed, objectives, self.keep_graph or (apart and rest is not None))]
        if apart:
            alone = None
            if rest is not None and passed.table.counts[-1] > 0:
                segments = torch.zeros(shares.instances, dtype=torch.int64, device=rest.device)
                alone = engine.compute_jacobian(rest[None], segments, self.materialise, self.keep_graph)
            parts.append(alone or self._no_rows(1))
        if not self.keep_graph:
            shares.release()
        jacobians = [jacobian for jacobian in parts if jacobian is not None]
        jacobian = Jacobian.cat(jacobians) if jacobians else None
        return Recorded(passed.table, jacobian, passed.broken, shares.normalised, extra, passed)

    def _rows_of_instances(self, passed: Passed, objectives: int, retain_graph: bool) -> Jacobian | None:
        engine, shares, segments = self.trainer.engine(), passed.shares, passed.members.segments
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

    def _no_rows(self, objectives: int) -> Jacobian | None:
        return self.jacobian_of({}, objectives) if objectives else None

    def jacobian_of(self, gradients: Mapping[nn.Parameter, Tensor], objectives: int = 1) -> Jacobian:
        """Return the row of one objective from its gradient; without a gradient, rows of zeros, of any number."""
        rows = {p: DenseRows(g.reshape(1, -1), p.shape) for p, g in gradients.items()}
        trainer = self.trainer
        return Jacobian({p: rows.get(p) for p in trainer.trainable()}, objectives, trainer.engine().block_names())

    def _step(self, batch: Any, step: Step, backward: Callable[[Tensor], T]) -> tuple[Tensor, T]:
        trainer, results = self.trainer, []

        def take(loss: Tensor) -> None:
            results.append(None if results else backward(loss))

        trainer.jd_outputs.begin(batch)
        trainer.jd_inputs = trainer.jd_streams = trainer.jd_unreduced = None
        trainer.jd_backward = take
        try:
            with trainer.accelerator.no_sync(self.model):
                value = step(self.model, without_groups(batch))
        finally:
            trainer.jd_backward = None
        if len(results) != 1:
            raise ValueError(
                f"The training step of {type(trainer).__name__} called accelerator.backward {len(results)} times for "
                "one batch: call it, or super().training_step, once, with the sum of the losses."
            )
        return value, results[0]

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


def _table(shares: Shares, members: Membership) -> ObjectiveTable:
    """Build the table of a micro-batch's objectives; losses are NaN if values are unknown."""
    counts = members.added(shares.counts)
    if shares.values is None:
        sums = parts = torch.full_like(counts, torch.nan, dtype=torch.float64)
    else:
        sums, parts = (members.added(v.masked_fill(~shares.some, 0)) for v in (shares.values.sums, shares.values.parts))
    return ObjectiveTable(parts, sums, counts.double(), members.groups, members.names)

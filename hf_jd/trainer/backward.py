"""One micro-batch: Trainer's own step runs, and the loss that it would descend becomes rows.

Trainer's step ends in `accelerator.backward(loss)`. That call is taken over: the loss is split by instance
(`splitting.py`), so that any `compute_loss` works as it stands, with its own metrics and scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_jd.batches import selected, stand_in, without_groups
from hf_jd.distributed.processes import anywhere
from hf_jd.gramian import Jacobian
from hf_jd.gramian.random_streams import RandomState, set_random_state
from hf_jd.gramian.rows import DenseRows
from hf_jd.objectives import Membership, ObjectiveTable, membership
from hf_jd.trainer.backends import Backend
from hf_jd.trainer.gradients import set_aside
from hf_jd.trainer.metrics_of_trl import unchanged_metrics
from hf_jd.trainer.shares import Shares, at
from hf_jd.trainer.splitting import Whose, shares_of
from hf_jd.trainer.values import part_of_router

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin

logger = logging.get_logger(__name__)

Step = Callable[[nn.Module, Any], Tensor]
"""Trainer's own step, of a model and a batch without the groups' ids; returns what it logs."""


@dataclass
class Passed:
    """A micro-batch after a forward pass.

    Attributes:
        batch: As collated; of zeros where it held no example.
        whose: What it tells of its instances.
        inputs: The batch as Trainer prepared it.
        streams: Where the random streams stood before the forward, if a second pass may follow.
        shares: The instances' shares of the loss.
        members: The objectives of these.
        table: What is known of the objectives, and of the loss's rest where that is one more.
        broken: [] how many instances, and losses of the whole batch, are left out because they aren't finite.
    """

    batch: Any
    whose: Whose
    inputs: Any
    streams: RandomState | None
    shares: Shares
    members: Membership
    table: ObjectiveTable
    broken: Tensor


class Recorded(NamedTuple):
    """A micro-batch after its rows are recorded.

    Attributes:
        table: What is known of its objectives.
        jacobian: Their rows, multiplied by the scale of GradScaler; None where there are none.
        broken: See `Passed`.
        normalised: Whether rows are shares of Trainer's loss, instead of sums.
        extra: The gradient of the part of the loss that no instance owns and no weighting sees, if there is one.
        passed: The micro-batch, for a second pass; None where it is one objective as a whole.
    """

    table: ObjectiveTable
    jacobian: Jacobian | None
    broken: Tensor
    normalised: bool
    extra: dict[nn.Parameter, Tensor]
    passed: Passed | None


class Recorder:
    """Runs the micro-batches of one update.

    Args:
        trainer: Whose step runs.
        backend: Where.
        model: The model as Trainer has wrapped it.
        present: [G] the sorted ids of the groups that are weighed together; None without a group column.
        materialise: Whether rows are formed, or kept as the layers' inputs and gradients where those are smaller.
        keep_graph: Whether the graph of the losses is kept.

    Attributes:
        scale: What rows are multiplied by: the scale of GradScaler.
        has_rest: Whether a loss had a part that no instance owns.
    """

    def __init__(
        self,
        trainer: JDTrainerMixin,
        backend: Backend,
        model: nn.Module,
        present: Tensor | None,
        materialise: bool,
        keep_graph: bool,
    ):
        self.trainer, self.backend, self.model = trainer, backend, backend.measured(model)
        self.present, self.materialise, self.keep_graph = present, materialise, keep_graph
        self.kind = trainer.jd_args.kind
        scaler = trainer.accelerator.scaler
        self.scale = 1.0 if scaler is None else scaler.get_scale()
        self.has_rest = False

    def record(self, batch: Any, step: Step) -> tuple[Tensor, Recorded]:
        """Runs Trainer's own step on a micro-batch, whose loss becomes rows.

        Args:
            batch: As collated.
            step: The step.

        Returns:
            What the step returned, for Trainer's log; and the rows.

        Raises:
            ValueError: The step didn't call `accelerator.backward` once, or its loss can't be split.
        """
        recorded: list[Recorded] = []
        with set_aside(self.trainer.trainable()) as past:
            value = self.run(batch, step, lambda passed: recorded.append(self.rows(passed)))
        if any(bool(gradient.any()) for gradient in past.values()):
            raise ValueError(
                f"{type(self.trainer).__name__} ran a backward pass of its own, past accelerator.backward, which left "
                "gradients that can't be split by instance: take these from torch.autograd.grad, add the losses up, or "
                "choose --jd_objectives batch, which takes each batch as one objective."
            )
        return value, recorded[0]

    def run(self, batch: Any, step: Step, backward: Callable[[Passed], None]) -> Tensor:
        """Runs the step with another backward in the place of accelerate's; returns what it returned."""
        trainer = self.trainer
        whose = Whose.of(batch, trainer.jd_args.jd_packed, trainer.args.device)
        batch = stand_in(batch) if whose.empty else batch
        value = self._step(batch, step, lambda loss: backward(self._passed(batch, whose, loss)))
        return torch.zeros_like(value) if whose.empty else value

    def whole(self, batch: Any, step: Step) -> tuple[Tensor, Recorded]:
        """Runs the step on a micro-batch that is one objective: its row is its gradient, of all passes it makes."""
        losses: list[Tensor] = []

        def backward(loss: Tensor) -> None:
            losses.append(loss.detach())
            loss.backward()

        with self.trainer.engine().paused(), set_aside(self.trainer.trainable()) as gradients:
            value = self._step(batch, step, backward)
        finite = losses[0].isfinite()[None]
        unknown = finite.double() * torch.nan
        labels = torch.stack([finite.long() * 0 - 1, finite.long() * 0], dim=1)
        table = ObjectiveTable.of(torch.stack([unknown, unknown, finite.double()], dim=1), labels)
        jacobian = self.jacobian_of(gradients if finite else {})
        return value, Recorded(table, jacobian, (~finite).sum(), True, {}, None)

    def again(self, first: Passed, model: nn.Module, kept: Tensor | None = None) -> Passed:
        """Runs a micro-batch forward once more, with the random numbers of its first pass.

        Args:
            first: After that.
            model: The model to run.
            kept: [B] (bool) the instances to run; None for all.
        """
        trainer, batch, inputs = self.trainer, first.batch, first.inputs
        if first.streams is None:
            raise ValueError(
                f"The training step of {type(trainer).__name__} has to be run once more, which isn't possible where it "
                "does not call `_prepare_inputs`: leave --jd_backward at one_pass, and check the losses of the batch."
            )
        if kept is not None:
            batch, inputs = (selected(part, kept, first.whose.documents) for part in (batch, inputs))
        set_random_state(first.streams, trainer.args.device)
        trainer.jd_outputs.begin(batch)
        trainer.jd_inputs = inputs
        with unchanged_metrics(trainer), trainer.accelerator.no_sync(model), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, copy(inputs), num_items_in_batch=trainer.jd_items)
        whose = first.whose if first.whose.empty else Whose.of(batch, trainer.jd_args.jd_packed, trainer.args.device)
        passed = self._passed(batch, whose, loss, first.streams)
        # What Trainer's step does to a loss is in the sizes of the first pass.
        passed.shares.like(first.shares, kept)
        return passed

    def rows(self, passed: Passed) -> Recorded:
        """The rows of a micro-batch's objectives; its graph is let go, unless it is kept."""
        engine, shares = self.trainer.engine(), passed.shares
        rest = shares.rest
        self.has_rest |= rest is not None
        apart = self.trainer.jd_args.jd_extra_losses == "objective"
        extra = {}
        if rest is not None and not apart and not self.backend.owns_backward:
            extra = engine.gradients(rest)
        objectives = len(passed.members.groups) // shares.names
        found = [self._rows_of_instances(passed, objectives, self.keep_graph or (apart and rest is not None))]
        if apart:
            alone = None
            if rest is not None and passed.table.counts[-1] > 0:
                segments = torch.zeros(shares.instances, dtype=torch.int64, device=rest.device)
                alone = engine.compute_jacobian(rest[None], segments, self.materialise, self.keep_graph)
            found.append(alone or self._no_rows(1))
        if not self.keep_graph:
            shares.release()
        jacobians = [jacobian for jacobian in found if jacobian is not None]
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
            shares.pieces = []  # The logits' gradients are let go on the way.
        of_rows = segments if passed.whose.documents is None else at(segments, passed.whose.documents)
        return engine.compute_jacobian(losses, of_rows, self.materialise, retain_graph)

    def _no_rows(self, objectives: int) -> Jacobian | None:
        return self.jacobian_of({}, objectives) if objectives else None

    def jacobian_of(self, gradients: Mapping[nn.Parameter, Tensor], objectives: int = 1) -> Jacobian:
        """The row of one objective from its gradient; without a gradient, rows of zeros, of any number."""
        rows = {p: DenseRows(g.reshape(1, -1), p.shape) for p, g in gradients.items()}
        trainer = self.trainer
        return Jacobian({p: rows.get(p) for p in trainer.trainable()}, objectives, trainer.engine().block_names())

    def _step(self, batch: Any, step: Step, backward: Callable[[Tensor], None]) -> Tensor:
        trainer, losses = self.trainer, []

        def take(loss: Tensor) -> None:
            losses.append(loss.detach())
            if len(losses) == 1:
                backward(loss)

        trainer.jd_outputs.begin(batch)
        trainer.jd_inputs = trainer.jd_streams = trainer.jd_unreduced = None
        trainer.jd_backward = take
        try:
            with trainer.accelerator.no_sync(self.model):
                value = step(self.model, without_groups(batch))
        finally:
            trainer.jd_backward = None
        if len(losses) != 1:
            raise ValueError(
                f"The training step of {type(trainer).__name__} called accelerator.backward {len(losses)} times for "
                "one batch: call it, or super().training_step, once, with the sum of the losses."
            )
        return value

    def _passed(self, batch: Any, whose: Whose, loss: Tensor, streams: RandomState | None = None) -> Passed:
        """Splits the loss of a micro-batch, and says which objectives that is of."""
        trainer, last = self.trainer, self.trainer.jd_outputs.last
        shares, names = shares_of(trainer, loss * (self.scale / self.backend.divisor()), whose, self.scale)
        broken = self._take_out_broken(shares, whose)
        groups = whose.groups
        if whose.empty and self.present is not None:
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
        passed = Passed(batch, whose, trainer.jd_inputs, streams, shares, members, table, broken)
        if shares.unreduced and first:
            return self._without_broken(passed)
        return passed

    def _without_broken(self, passed: Passed) -> Passed:
        """Runs a batch once more without instances whose unreduced loss isn't finite: behind it, 0 may meet NaN."""
        kept: Tensor | None = passed.shares.finite.all(1)
        some = bool(kept.any() and not kept.all()) and not passed.whose.empty
        # Where forwards gather parameters, all processes make as many.
        if not (anywhere(some, kept.device) if self.backend.shards else some):
            return passed
        return replace(self.again(passed, self.model, kept if some else None), broken=passed.broken)

    def _row_of_rest(self, loss: Tensor, shares: Shares, last: Any) -> ObjectiveTable:
        """[1] what is known of the part of the loss that no instance owns."""
        router = part_of_router(self.trainer, last)
        value = loss.detach().double() * (torch.nan if router is None else router)
        counts = torch.tensor(float(shares.rest is not None and bool(loss.isfinite())), device=loss.device)
        raw = value if router is None else last["loss"].detach().double() * router
        numbers = torch.stack([value / self.backend.divisor(), raw, counts.double()])[None]
        labels = torch.tensor([[-1, shares.names]], device=loss.device)
        return ObjectiveTable.of(numbers, labels)

    def _take_out_broken(self, shares: Shares, whose: Whose) -> Tensor:
        """Takes what isn't finite out of all objectives, and logs the instances; returns how many, and losses."""
        losses = shares.drop_broken_losses()
        broken = ~shares.finite.all(1) & (not whose.empty)
        if broken.any():
            shares.take_out(broken)
            step = self.trainer.state.global_step + 1
            for i in broken.nonzero().flatten().tolist():
                group = "" if whose.groups is None else f" (group `{self.trainer.group_name(int(whose.groups[i]))}`)"
                logger.warning(f"Update {step}: instance {i}{group} has a loss that isn't finite, and is left out.")
        return broken.sum() + losses


def _table(shares: Shares, members: Membership) -> ObjectiveTable:
    """What is known of a micro-batch's objectives; losses are NaN where values aren't known."""
    counts = members.added(shares.counts)
    if shares.values is None:
        sums = parts = torch.full_like(counts, torch.nan, dtype=torch.float64)
    else:
        sums, parts = (members.added(v.masked_fill(~shares.some, 0)) for v in (shares.values.sums, shares.values.parts))
    return ObjectiveTable.of(torch.stack([parts, sums, counts.double()], dim=1), members.labels)

"""One update: micro-batches -> rows -> Gramian -> weights -> `.grad`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_jd.collator import GROUP_KEY
from hf_jd.distributed import (
    AddedRows,
    GatheredRows,
    OwnRows,
    add_gradients,
    add_over_processes,
    gather_uneven,
    process_count,
)
from hf_jd.gramian import Jacobian
from hf_jd.metrics import step_metrics
from hf_jd.objectives import OBJECTIVES, Objectives, Part
from hf_jd.weighting import Weighting

if TYPE_CHECKING:
    from hf_jd.trainer import JDTrainerMixin

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class JDState:
    """The last step, for callbacks.

    Attributes:
        names: [m] the objectives' names: those of groups, or the positions of instances in the update.
        gramian: [m, m].
        weights: [m].
        losses: [m] the objectives' values, whose mean is Trainer's loss; those of `--jd_ascend` are negated.
    """

    names: list[str]
    gramian: Tensor
    weights: Tensor
    losses: Tensor


class Extra(NamedTuple):
    """The part of a micro-batch's loss that no token or instance owns: [] its value, and its gradient."""

    value: Tensor
    gradients: dict[nn.Parameter, Tensor]


class _Recorded(NamedTuple):
    """A micro-batch after its first pass."""

    batch: Mapping[str, Any]
    rng_state: list[Tensor]
    """The random numbers of the pass, for a second one."""
    part: Part
    jacobian: Jacobian | None
    broken: Tensor
    """[] how many instances were left out because their loss isn't finite."""
    extra: Extra | None


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
        self.model = model
        self.batches = batches
        self.num_items = num_items
        self.alone = self.jd.jd_scope == "micro_batch"
        self.micro_batches = trainer.current_gradient_accumulation_steps if self.alone else len(batches)
        # How many updates like this one are averaged, unless the losses already hold their share of the whole.
        self.parts = self.micro_batches * process_count() if self.alone else 1
        self.kind = OBJECTIVES[self.jd.jd_objectives]
        self.present = self._present_groups()
        scaler = trainer.accelerator.scaler
        self.scale = 1.0 if scaler is None else scaler.get_scale()
        # A second pass can walk the graph of one micro-batch again; those of several would not fit in memory.
        self.keep_graph = self.jd.jd_backward == "two_pass" and len(batches) == 1
        self.materialise = self._rows_fit()

    def run(self) -> Tensor:
        """Adds the update to `.grad`.

        Returns:
            The part of this process in the objectives' mean, times the number of processes, as Trainer logs it.
        """
        recorded = [self._record(batch) for batch in self.batches]
        own, rows = self._joined(recorded)
        objectives = Objectives(rows.table(own), self.jd.own_mean, recorded[0].part.denominator is not None)
        gramian = rows.gramian() / self.scale**2
        usable = objectives.usable(gramian)
        factors = objectives.factors(usable)
        share = 1 if objectives.normalised else 1 / self.parts
        broken = self._count_broken(recorded, objectives, usable)
        signed = factors * self._signs(objectives)
        weights = self._weigh(gramian, objectives, usable, signed) * signed * share
        if self.trainer.accelerator.scaler is not None and broken:
            # An overflow has to stay in `.grad`: GradScaler then skips the step and lowers its scale.
            accumulate({p: torch.full_like(p, torch.inf) for p in self.trainer.trainable()})
        elif self.jd.jd_backward == "one_pass":
            # GradScaler divides by its scale, which is in the rows.
            accumulate(rows.weighted_sum(weights, usable))
        else:
            self._second_pass(recorded, weights[rows.mine], usable[rows.mine])
        extra = self._add_extra(recorded)
        mean = (factors * share / usable.sum().clamp(min=1))[rows.mine] * own[:, 0]
        return (mean[usable[rows.mine]].sum().to(self.trainer.args.device) + extra) * process_count()

    def _signs(self, objectives: Objectives) -> Tensor:
        """[M] -1 for the objectives of groups whose loss is to be raised, 1 for the others."""
        raised = self.jd.jd_ascend or []
        signs = [-1.0 if k >= 0 and self.trainer.group_name(k) in raised else 1.0 for k in objectives.groups.tolist()]
        return torch.tensor(signs, dtype=torch.float64, device=objectives.table.device)

    def _add_extra(self, recorded: list[_Recorded]) -> Tensor:
        """Adds the mean over micro-batches and processes of what no token or instance owns; its part of this process.

        Trainer adds the micro-batches' instead of averaging them, where the model normalises its other losses itself.
        """
        share = 1 / (self.micro_batches * process_count())
        extras = [r.extra for r in recorded if r.extra is not None]
        total: dict[nn.Parameter, Tensor] = {}
        for extra in extras:
            for p, gradient in extra.gradients.items():
                total[p] = total[p] + share * gradient if p in total else share * gradient
        if add_over_processes(torch.tensor(float(self.trainer.has_extra), device=self.trainer.args.device)):
            accumulate(add_gradients(total, self.trainer.trainable()))
        return sum((share * extra.value for extra in extras), torch.zeros((), device=self.trainer.args.device))

    def _count_broken(self, recorded: list[_Recorded], objectives: Objectives, usable: Tensor) -> Tensor:
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

    def _part(self, batch: Mapping[str, Any]) -> tuple[Part, Tensor | None]:
        """Runs a micro-batch forward: its part in the objectives, and what no instance owns, with a graph."""
        losses, counted, groups, extra = self.trainer.unreduced_losses(self.model, batch)
        if groups is None:
            groups = torch.full((len(losses),), -1, device=losses.device)
        if len(groups) != len(losses):
            raise ValueError(
                f"There are losses of {len(losses)} rows for {len(groups)} examples, so no row's group is known: use a "
                "collator that pads instead of packing."
            )
        denominator = self.trainer.denominator(losses, counted, self.num_items, self.micro_batches)
        present = groups if self.present is None else self.present
        return self.kind.split(losses, counted, groups, present, denominator), extra

    def _record(self, batch: Mapping[str, Any]) -> _Recorded:
        """Runs a micro-batch forward, and backward to its rows, which come multiplied by `scale`."""
        device, two_pass = self.trainer.args.device, self.jd.jd_backward == "two_pass"
        rng_state = _rng_state(device) if two_pass else []
        jacobian = own = None
        with self.trainer.accelerator.no_sync(self.model):
            part, extra = self._part(batch)
            broken = (~part.finite).sum()
            if broken:
                self._report_instances(batch, part.finite)
            if broken and part.finite.any():
                # NaN times 0 is NaN, in a backward pass too: the others have to be computed without those instances.
                batch = _selected(batch, part.finite)
                rng_state = _rng_state(device) if two_pass else []
                part, extra = self._part(batch)
            if extra is not None and extra.isfinite():
                own = Extra(extra.detach(), self._plain_gradients(extra * self.scale))
            if part.counts.any():
                losses = part.losses * self.scale
                jacobian = self.trainer.engine().compute_jacobian(losses, part.segments, self.materialise)
        if not self.keep_graph:
            part = replace(part, losses=part.losses.detach())
        return _Recorded(batch, rng_state, part, jacobian, broken, own)

    def _report_instances(self, batch: Mapping[str, Any], finite: Tensor) -> None:
        """Logs the instances whose loss isn't finite."""
        step = self.trainer.state.global_step + 1
        for i in (~finite).nonzero().flatten().tolist():
            groups = batch.get(GROUP_KEY)
            named = "" if groups is None else f" (group `{self.trainer.group_name(int(groups[i]))}`)"
            logger.warning(f"Update {step}: instance {i}{named} has a loss that isn't finite, and is left out.")

    def _plain_gradients(self, loss: Tensor) -> dict[nn.Parameter, Tensor]:
        """The gradient of a loss; its graph is kept, and `.grad` left as it was."""
        before = {p: p.grad for p in self.trainer.trainable()}
        for p in before:
            p.grad = None
        loss.backward(retain_graph=True)  # Reentrant checkpointing can't differentiate in any other way.
        gradients = {p: p.grad for p in before if p.grad is not None}
        for p, gradient in before.items():
            p.grad = gradient
        return gradients

    def _joined(self, recorded: list[_Recorded]) -> tuple[Tensor, OwnRows]:
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

    def _weigh(self, gramian: Tensor, objectives: Objectives, usable: Tensor, factors: Tensor) -> Tensor:
        """The weights [M] of the objectives, 0 for those that aren't usable; keeps the step's state and metrics."""
        weights = torch.zeros(len(usable), dtype=torch.float64, device=gramian.device)
        if not usable.any():
            return weights
        gramian = (factors.outer(factors).to(gramian) * gramian)[usable][:, usable]
        losses = (factors * objectives.table[:, 0])[usable]
        groups = objectives.groups[usable]
        group_names = {k: self.trainer.group_name(k) for k in groups.unique().tolist() if k >= 0}
        by_group = self.jd.jd_objectives == "group"
        names = [group_names[k] for k in groups.tolist()] if by_group else [str(i) for i in range(len(losses))]
        found = call_weighting(self.trainer.weighting, gramian, losses, names if by_group else None)
        weights[usable] = found
        self.trainer.jd_state = JDState(names, gramian, found, losses)
        means, counts = objectives.means[usable], objectives.counts[usable]
        self.trainer.jd_metrics.add(step_metrics(gramian, found, means, counts, groups, group_names))
        return weights

    def _second_pass(self, recorded: list[_Recorded], weights: Tensor, usable: Tensor) -> None:
        """Descends sum_k w_k loss_k, of losses computed again with the random numbers of their first pass."""
        before = {p: p.grad for p in self.trainer.trainable()}
        for p in before:
            p.grad = None
        start = 0
        for batch, rng_state, first, *_ in recorded:
            mine = slice(None) if self.kind.shared else slice(start, start + len(first.losses))
            start += len(first.losses)
            with self.trainer.accelerator.no_sync(self.model):
                if not self.keep_graph:
                    _set_rng_state(rng_state, self.trainer.args.device)
                part = first if self.keep_graph else self._part(batch)[0]
                losses = part.losses[usable[mine]]
                if len(losses):
                    self.trainer.accelerator.backward((weights[mine][usable[mine]].to(losses) * losses).sum())
        gradients = {p: p.grad for p in before if p.grad is not None}
        for p, gradient in before.items():
            p.grad = gradient
        accumulate(add_gradients(gradients, list(before)))


def call_weighting(weighting: Any, gramian: Tensor, losses: Tensor, names: list[str] | None) -> Tensor:
    """W(G) [m], float64, from a weighting of `hf_jd.weighting` or any other callable.

    Args:
        weighting: The callable.
        gramian: [m, m].
        losses: [m], for weightings that read them.
        names: [m] the objectives' names, where they stay the same from step to step.

    Raises:
        ValueError: It returned something else than m finite weights.
    """
    m = len(losses)
    if m == 1:
        # One objective has nothing to be weighed against: the stock step.
        return torch.ones(1, dtype=torch.float64, device=gramian.device)
    if isinstance(weighting, Weighting):
        weights = weighting(losses if weighting.reads == "losses" else gramian, names=names)
    else:
        weights = weighting(gramian)
    if not isinstance(weights, Tensor) or weights.shape != (m,) or not weights.isfinite().all():
        raise ValueError(
            f"The weighting has to return {m} finite weights for a Gramian of shape [{m}, {m}]; it returned {weights}."
        )
    return weights.detach().to(device=gramian.device, dtype=torch.float64)


def _selected(batch: Mapping[str, Any], keep: Tensor) -> dict[str, Any]:
    """The batch with some of its instances only; `keep` [B] (bool)."""

    def of(value: Any) -> Any:
        by_instance = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(keep)
        return value[keep.to(value.device)] if by_instance else value

    return {key: of(value) for key, value in batch.items()}


def accumulate(gradients: dict[nn.Parameter, Tensor]) -> None:
    """Adds to `.grad`, where a stream that ended in mid-accumulation may have left something."""
    for p, gradient in gradients.items():
        p.grad = gradient if p.grad is None else p.grad + gradient


def _rng_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def _set_rng_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)

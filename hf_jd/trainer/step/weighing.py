"""The weighing: (objectives, Gramians) -> w, with metrics and the state for callbacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_jd.metrics import Metrics, block_metrics, loss_metrics, step_metrics
from hf_jd.objectives import Kind, Objectives, ObjectiveTable
from hf_jd.trainer.step.foreign_weightings import checked_weights
from hf_jd.weighting import Weighting


@dataclass(frozen=True)
class JDState:
    """The last measured update, for callbacks.

    Attributes:
        names: [m] the objectives' names: groups or losses, the positions of instances in the update, or both,
            as `0/loss`.
        gramian: [m, m], of all parameters.
        weights: [m]; with `--jd_blocks`, [B, m], one set per block.
        losses: [m] the objectives' values, whose mean is Trainer's loss; negated for `--jd_ascend`. NaN if the loss was
            split at the model's outputs: its parts then have gradients, but no known values.
        blocks: With `--jd_blocks`, each block's Gramian [m, m], by the block's name, in the order of the weights.
    """

    names: list[str]
    gramian: Tensor
    weights: Tensor
    losses: Tensor
    blocks: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepSettings:
    """The settings for weighing an update.

    Attributes:
        kind: The kind of objectives.
        losses: The names of the losses.
        group_name: Returns the name of a group, from its id.
        raised: The names of the groups whose loss is raised.
        weights: W(G, losses, names of objectives, if they stay the same, block): `Control.weights` at this step.
        blocks: The names of the blocks of parameters; empty if all parameters are weighed together.
    """

    kind: Kind
    losses: Sequence[str]
    group_name: Callable[[int], str]
    raised: Sequence[str]
    weights: Callable[[Tensor, Tensor, Sequence[str] | None, str | None], Tensor]
    blocks: Sequence[str] = ()


class StepResult(NamedTuple):
    """The result of weighing an update.

    Attributes:
        weights: [B, M] the rows' weights in each block, 0 for unusable rows.
        state: The objectives, for callbacks; None if no row is usable.
        metrics: What is logged.
    """

    weights: Tensor
    state: JDState | None
    metrics: list[Metrics]


def weigh(gramians: Tensor, objectives: Objectives, settings: StepSettings) -> StepResult:
    """Compute the weights of an update's rows, separately in each block of parameters.

    A row times a factor f_k is its objective's row; f_k is negative for a loss that is raised. With D = diag(f) and w
    the weights for the objectives' Gramian D G D, the rows have the weights D w.

    Args:
        gramians: [B, M, M], one per block; B = 1 without blocks.
        objectives: The M rows.
        settings: See `StepSettings`.
    """
    usable = objectives.usable
    weights = torch.zeros(len(gramians), len(usable), dtype=torch.float64, device=gramians.device)
    if not usable.any():
        return StepResult(weights, None, [])
    factors = objectives.factors * signs(objectives.table.groups, settings)
    gramians = (factors.outer(factors).to(gramians) * gramians)[:, usable][:, :, usable]
    members, joined = objectives.members, objectives.joined()
    (b, m), n = (len(gramians), len(joined)), len(members)
    if m < n:
        gramians = gramians.new_zeros(b, m, n).index_add(1, members, gramians)
        gramians = gramians.new_zeros(b, m, m).index_add(2, members, gramians)
    losses = torch.zeros_like(joined.losses).index_add(0, members, (factors * objectives.table.losses)[usable])
    names = _names(joined, objectives.whole, settings)
    lasting = names if settings.kind.shared else None
    pairs = zip(gramians, settings.blocks or [None], strict=True)
    of_objectives = torch.stack([settings.weights(gramian, losses, lasting, block) for gramian, block in pairs])
    weights[:, usable] = of_objectives[:, members] * factors[usable].to(weights)
    metrics = [
        step_metrics(gramians, of_objectives, _means(joined), joined.counts, ids, label)
        for ids, label in _labels(joined, settings)
    ]
    if settings.blocks:
        metrics.append(block_metrics(gramians, of_objectives))
        blocks = dict(zip(settings.blocks, gramians, strict=True))
        return StepResult(weights, JDState(names, gramians.sum(0), of_objectives, losses, blocks), metrics)
    return StepResult(weights, JDState(names, gramians[0], of_objectives[0], losses), metrics)


def _means(table: ObjectiveTable) -> Tensor | None:
    """Return the losses per token [m]; None if values are unknown."""
    return None if table.sums.isnan().all() else table.means


def _names(table: ObjectiveTable, whole: int | None, settings: StepSettings) -> list[str]:
    """Return the objectives' names: groups or losses, or the positions of instances in the update."""
    kind, losses, seen, names = settings.kind, settings.losses, Counter[int](), []
    for group, name in zip(table.groups.tolist(), table.names.tolist(), strict=True):
        if kind.shared and group >= 0:
            names.append(settings.group_name(group))
        elif kind.shared or name == whole:
            names.append(losses[name])
        else:
            names.append(f"{seen[name]}/{losses[name]}" if kind.several else str(seen[name]))
            seen[name] += 1
    return names


def _labels(table: ObjectiveTable, settings: StepSettings) -> list[tuple[Tensor, dict[int, str]]]:
    """Return the labels for logs: the ids [M] of groups, and of losses if there are several, with their names."""
    labels = [(table.groups, {k: settings.group_name(k) for k in table.groups.unique().tolist() if k >= 0})]
    if len(settings.losses) > 1:
        labels.append((table.names, dict(enumerate(settings.losses))))
    return labels


def plain_metrics(table: ObjectiveTable, settings: StepSettings) -> list[Metrics]:
    """Return the losses by group and by name, for an update that isn't weighed."""
    if _means(table) is None:
        return []
    return [loss_metrics(table.means, table.counts, ids, label) for ids, label in _labels(table, settings)]


def multipliers(table: ObjectiveTable, settings: StepSettings, last: Callable[[str], float]) -> Tensor:
    """Return c [M], float64, for an update that isn't measured: last weights over the mean's, with signs.

    Args:
        table: The objectives.
        settings: See `StepSettings`.
        last: Returns an objective's last weight over the mean's, from its name.
    """
    c = signs(table.groups, settings)
    if not settings.kind.shared:
        return c
    return c * c.new_tensor([last(name) for name in _names(table, None, settings)])


def signs(groups: Tensor, settings: StepSettings) -> Tensor:
    """Return -1 for objectives whose groups [M] have their loss raised, 1 for the others: [M]."""
    if not settings.raised:
        return torch.ones(len(groups), dtype=torch.float64, device=groups.device)
    raised = [k >= 0 and settings.group_name(k) in settings.raised for k in groups.tolist()]
    return torch.tensor([-1.0 if up else 1.0 for up in raised], dtype=torch.float64, device=groups.device)


def call_weighting(weighting: Any, gramian: Tensor, losses: Tensor, names: Sequence[str] | None) -> Tensor:
    """Compute W(G) [m], float64, with a weighting of `hf_jd.weighting` or any other callable.

    Args:
        weighting: The callable.
        gramian: [m, m].
        losses: [m], for weightings that read them.
        names: [m] the objectives' names, if they stay the same from step to step.

    Raises:
        ValueError: It did not return m finite real weights.
    """
    m = len(losses)
    if m == 1:
        # A single objective isn't weighed against others: this is the stock step.
        return torch.ones(1, dtype=torch.float64, device=gramian.device)
    if isinstance(weighting, Weighting):
        weights = weighting(losses if weighting.reads == "losses" else gramian, names=names)
    else:
        weights = weighting(gramian)
    return checked_weights(weighting, weights, m).detach().to(device=gramian.device, dtype=torch.float64)

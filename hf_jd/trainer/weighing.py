"""The weighing: (objectives, G) -> w, and what a step leaves to be read of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_jd.metrics import loss_metrics, step_metrics
from hf_jd.objectives import Objectives
from hf_jd.trainer.foreign_weightings import checked_weights
from hf_jd.weighting import Weighting

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin


@dataclass(frozen=True)
class JDState:
    """The last update that was measured, for callbacks.

    Attributes:
        names: [m] the objectives' names: those of groups or losses, the positions of instances in the update, or both,
            as `0/loss`.
        gramian: [m, m].
        weights: [m].
        losses: [m] the objectives' values, whose mean is Trainer's loss; those of `--jd_ascend` are negated. NaN where
            the loss was split at the model's outputs: its parts have gradients, and no known values.
    """

    names: list[str]
    gramian: Tensor
    weights: Tensor
    losses: Tensor


def weigh(trainer: JDTrainerMixin, gramian: Tensor, objectives: Objectives, usable: Tensor, factors: Tensor) -> Tensor:
    """The weights [M] of the rows, 0 for those that aren't usable; keeps the step's state and metrics.

    Args:
        trainer: Whose weighting it is, and who keeps them.
        gramian: [M, M], of the rows.
        objectives: What is known of the M rows.
        usable: [M] (bool).
        factors: [M] what turns each row into its objective, or its part of it.
    """
    weights = torch.zeros(len(usable), dtype=torch.float64, device=gramian.device)
    if not usable.any():
        return weights
    gramian = (factors.outer(factors).to(gramian) * gramian)[usable][:, usable]
    members, joined = objectives.members(usable), objectives.joined(usable)
    m = len(joined.table)
    if m < len(gramian):
        gramian = gramian.new_zeros(m, len(gramian)).index_add(0, members, gramian)
        gramian = gramian.new_zeros(m, m).index_add(1, members, gramian)
    losses = torch.zeros_like(joined.losses).index_add(0, members, (factors * objectives.losses)[usable])
    names = _names(trainer, joined)
    lasting = names if trainer.jd_args.kind.shared else None
    found = trainer.jd_control.weights(gramian, losses, lasting, trainer.state.global_step)
    weights[usable] = found[members]
    trainer.jd_state = JDState(names, gramian, found, losses)
    for ids, label in _labels(trainer, joined):
        means = joined.means if joined.valued else None
        trainer.jd_metrics.add(step_metrics(gramian, found, means, joined.counts, ids, label))
    return weights


def _names(trainer: JDTrainerMixin, joined: Objectives) -> list[str]:
    """The objectives' names: those of groups or losses, or the positions of instances in the update."""
    losses, seen, names = trainer.jd_loss_names, Counter[int](), []
    kind = trainer.jd_args.jd_objectives
    for group, name in zip(joined.groups.tolist(), joined.names.tolist(), strict=True):
        if kind in ("loss", "reward") or name == joined.whole:
            names.append(losses[name])
        elif kind == "group":
            names.append(trainer.group_name(group) if group >= 0 else losses[name])
        else:
            names.append(f"{seen[name]}/{losses[name]}" if kind == "instance_loss" else str(seen[name]))
            seen[name] += 1
    return names


def _labels(trainer: JDTrainerMixin, joined: Objectives) -> list[tuple[Tensor, dict[int, str]]]:
    """What tells the objectives apart in logs: the ids [M] of their groups, and of their losses, with the names."""
    labels = [(joined.groups, {k: trainer.group_name(k) for k in joined.groups.unique().tolist() if k >= 0})]
    if len(trainer.jd_loss_names) > 1:
        labels.append((joined.names, dict(enumerate(trainer.jd_loss_names))))
    return labels


def keep_losses(trainer: JDTrainerMixin, joined: Objectives) -> None:
    """Keeps the losses by group and by name, of an update that isn't weighed."""
    for ids, label in _labels(trainer, joined):
        trainer.jd_metrics.add(loss_metrics(joined.means, joined.counts, ids, label))


def multipliers(trainer: JDTrainerMixin, table: Tensor) -> Tensor:
    """c [M], float64, of an update that isn't measured: each objective's last weight over the mean's, with its sign.

    Args:
        trainer: Whose control it is.
        table: [M, 5]; see `Part.table`.
    """
    c = signs(trainer, table[:, 3].long())
    if not trainer.jd_args.kind.shared:
        return c
    names = [
        trainer.group_name(group) if group >= 0 else trainer.jd_loss_names[name]
        for group, name in table[:, 3:].long().tolist()
    ]
    return c * c.new_tensor([trainer.jd_control.multiplier(name, trainer.state.global_step) for name in names])


def signs(trainer: JDTrainerMixin, groups: Tensor) -> Tensor:
    """[M] -1 for the objectives of groups [M] whose loss is to be raised, 1 for the others."""
    raised = trainer.jd_args.jd_ascend or []
    if not raised:
        return torch.ones(len(groups), dtype=torch.float64, device=groups.device)
    signs = [-1.0 if k >= 0 and trainer.group_name(k) in raised else 1.0 for k in groups.tolist()]
    return torch.tensor(signs, dtype=torch.float64, device=groups.device)


def call_weighting(weighting: Any, gramian: Tensor, losses: Tensor, names: Sequence[str] | None) -> Tensor:
    """W(G) [m], float64, from a weighting of `hf_jd.weighting` or any other callable.

    Args:
        weighting: The callable.
        gramian: [m, m].
        losses: [m], for weightings that read them.
        names: [m] the objectives' names, where they stay the same from step to step.

    Raises:
        ValueError: It returned something else than m finite real weights.
    """
    m = len(losses)
    if m == 1:
        # One objective has nothing to be weighed against: the stock step.
        return torch.ones(1, dtype=torch.float64, device=gramian.device)
    if isinstance(weighting, Weighting):
        weights = weighting(losses if weighting.reads == "losses" else gramian, names=names)
    else:
        weights = weighting(gramian)
    return checked_weights(weighting, weights, m).detach().to(device=gramian.device, dtype=torch.float64)

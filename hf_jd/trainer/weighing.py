"""The weighing: (objectives, G) -> w, and what a step leaves to be read of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_jd.metrics import step_metrics
from hf_jd.objectives import Objectives
from hf_jd.weighting import Weighting

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin


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


def weigh(trainer: JDTrainerMixin, gramian: Tensor, objectives: Objectives, usable: Tensor, factors: Tensor) -> Tensor:
    """The weights [M] of the objectives, 0 for those that aren't usable; keeps the step's state and metrics.

    Args:
        trainer: Whose weighting it is, and who keeps them.
        gramian: [M, M], of the rows of the losses.
        objectives: The M losses.
        usable: [M] (bool).
        factors: [M] what turns each loss into its objective.
    """
    weights = torch.zeros(len(usable), dtype=torch.float64, device=gramian.device)
    if not usable.any():
        return weights
    gramian = (factors.outer(factors).to(gramian) * gramian)[usable][:, usable]
    losses = (factors * objectives.table[:, 0])[usable]
    groups = objectives.groups[usable]
    group_names = {k: trainer.group_name(k) for k in groups.unique().tolist() if k >= 0}
    by_group = trainer.jd_args.jd_objectives == "group"
    names = [group_names[k] for k in groups.tolist()] if by_group else [str(i) for i in range(len(losses))]
    found = call_weighting(trainer.weighting, gramian, losses, names if by_group else None)
    weights[usable] = found
    trainer.jd_state = JDState(names, gramian, found, losses)
    means, counts = objectives.means[usable], objectives.counts[usable]
    trainer.jd_metrics.add(step_metrics(gramian, found, means, counts, groups, group_names))
    trainer.jd_log.add(gramian, groups, group_names)
    return weights


def signs(trainer: JDTrainerMixin, objectives: Objectives) -> Tensor:
    """[M] -1 for the objectives of groups whose loss is to be raised, 1 for the others."""
    raised = trainer.jd_args.jd_ascend or []
    signs = [-1.0 if k >= 0 and trainer.group_name(k) in raised else 1.0 for k in objectives.groups.tolist()]
    return torch.tensor(signs, dtype=torch.float64, device=objectives.table.device)


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

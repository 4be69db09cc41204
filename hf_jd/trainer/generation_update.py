"""One update of a trainer that generates, with its completions' groups, or its rewards, as objectives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_jd.gramian import Jacobian
from hf_jd.gramian.random_streams import RandomState
from hf_jd.metrics import Metrics
from hf_jd.trainer.backward import Passed, Recorder
from hf_jd.trainer.cotangents import Cotangent, surrogates
from hf_jd.trainer.named_gradients import NamedRecorder, NamedUpdate, Rows
from hf_jd.trainer.rewards import Direction, PolicyLoss, directions, scalar
from hf_jd.trainer.splitting import Whose
from hf_jd.trainer.update import Update

if TYPE_CHECKING:
    from hf_jd.trainer.generations import GeneratingMixin


class Shares(NamedTuple):
    """The loss of a batch of completions by objective.

    Attributes:
        objectives: K objectives' cotangents at each output, [B, ...].
        advantages: [B, K]; see `directions`.
        apart: The cotangents of an objective that is no reward, if there is one.
        rest: The cotangents of the part of the mean that no weighting sees.
        noise: The cotangents from which the objectives' were computed as differences.
        finite: [B] (bool) whether a completion's cotangents are finite; others are set to 0.
    """

    objectives: list[list[Tensor]]
    advantages: Tensor
    apart: list[Tensor] | None
    rest: list[Tensor]
    noise: list[Tensor]
    finite: Tensor


class GenerationRecorder(Recorder):
    """Records micro-batches of completions, whose groups came with them; see `Recorder`."""

    trainer: GeneratingMixin

    def _passed(self, batch: Any, whose: Whose, loss: Tensor, streams: RandomState | None = None) -> Passed:
        """Takes the groups from the batch as TRL has prepared it; the list of prompts has none."""
        groups = self.trainer.jd_groups_of_batch
        whose = whose if groups is None else Whose(groups, len(groups), None)
        return super()._passed(batch, whose, loss, streams)


class RewardRecorder(NamedRecorder):
    """Records micro-batches of completions by reward; see `Recorder`."""

    trainer: GeneratingMixin

    def split(self, loss: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Splits the policy's loss by reward."""
        trainer = self.trainer
        policy = trainer.take_policy()
        assert policy.loss is not None
        # Trainer has divided the loss by accumulation, and scaled it, since TRL computed it.
        factor = torch.autograd.grad(loss, policy.loss, retain_graph=True)[0]
        shares = _shares(policy, factor, getattr(trainer.args, "jd_kl", "mean") == "objective")
        if trainer.jd_args.jd_check and not trainer.jd_proved and bool(shares.finite.all()):
            policy.prove()
            trainer.jd_proved = True
        counts = (shares.advantages != 0).sum(0)
        if shares.apart is not None:
            counts = torch.cat([counts, shares.finite.sum()[None]])
        return (policy, shares), counts, (~shares.finite).sum()

    def form(self, content: Any) -> Rows:
        """Forms the rows [K, n] of the rewards, and of the divergence if that is an objective; see `directions`."""
        policy, shares = content
        extra = {}
        if any(bool(c.any()) for c in shares.rest):
            extra = self.trainer.engine().gradients(scalar(policy.outputs, shares.rest))
        rows = [] if shares.apart is None else [self.gradient_row(scalar(policy.outputs, shares.apart))]
        return Rows(Jacobian.cat([self._rows_by_reward(policy, shares), *rows]), extra)

    def weighted(self, content: Any, weights: Tensor) -> Tensor:
        """See `NamedRecorder`."""
        policy, shares = content
        objectives = [*shares.objectives, *([] if shares.apart is None else [shares.apart])]
        total = [c.clone() for c in shares.rest]
        for factor, gradients in zip(weights.tolist(), objectives, strict=True):
            total = [t + factor * c for t, c in zip(total, gradients, strict=True)]
        return scalar(policy.outputs, total)

    def _rows_by_reward(self, policy: PolicyLoss, shares: Shares) -> Jacobian:
        """Forms the rows [K, n] of the rewards with the fewest backward passes, and logs their number."""
        trainer, count = self.trainer, len(shares.objectives)
        common = directions(shares.objectives, shares.advantages, shares.noise)
        passes = len(common) if 0 < len(common) < count else count
        trainer.jd_metrics.add(Metrics(("jd/reward_passes",), torch.tensor([float(passes)], dtype=torch.float64)))
        if passes == count:
            return Jacobian.cat([self.gradient_row(scalar(policy.outputs, c)) for c in shares.objectives])
        rows = [self._rows_along(policy, direction, i + 1 == passes) for i, direction in enumerate(common)]
        return rows[0] if passes == 1 else rows[0] + rows[1]

    def _rows_along(self, policy: PolicyLoss, direction: Direction, last: bool) -> Jacobian:
        """Forms the objectives' rows as weighted sums of completions' rows, with one backward pass."""
        trainer, membership = self.trainer, direction.membership
        some = (membership != 0).any(0)
        if not some.any():
            return self.jacobian_of({}, len(membership))
        ids, m = torch.where(some, some.cumsum(0) - 1, -1), int(some.sum())
        pairs = zip(policy.outputs, direction.gradients, strict=True)
        parts = [surrogates(Cotangent(output, gradient), ids, m) for output, gradient in pairs if output.dim()]
        losses = torch.stack([part.to(parts[0]) for part in parts]).sum(0)
        instances = trainer.engine().compute_jacobian(losses, ids, materialise=False, retain_graph=not last)
        return instances.combined(membership[:, some])


class GenerationUpdate(Update):
    """An update of completions, by groups if there are any; see `Update`."""

    trainer: GeneratingMixin

    def _make_recorder(self, keep_graph: bool) -> Recorder:
        return GenerationRecorder(self.trainer, self.backend, self.model, self.present, self._rows_fit(), keep_graph)

    def _present_groups(self) -> Tensor | None:
        """Returns all groups' ids: an update's groups are unknown until TRL has shuffled its completions."""
        if self.jd.jd_group_column is None:
            return None
        names = self.trainer.jd_group_names
        if names is None:
            raise ValueError("A stream's groups of prompts can't be known in advance: list them with --jd_groups.")
        return torch.arange(len(names), device=self.trainer.args.device)


class RewardUpdate(NamedUpdate):
    """An update of completions by reward; see `Update`."""

    trainer: GeneratingMixin

    def _make_recorder(self, keep_graph: bool) -> RewardRecorder:
        self.trainer.jd_loss_names = self.trainer.objective_names() or []
        return RewardRecorder(self.trainer, self.backend, self.model, None, True, False)


def _shares(policy: PolicyLoss, factor: Tensor, kl_apart: bool) -> Shares:
    """Evaluates TRL's loss without advantages, and with each reward's.

    Args:
        policy: The loss.
        factor: [] multiplies its gradients.
        kl_apart: Whether the divergence is an objective.
    """
    advantages = policy.advantages
    zero = torch.zeros_like(advantages[:, 0])
    base = policy.gradients(zero)
    columns = [_less(policy.gradients(column), base) for column in advantages.T]
    rest, apart = base, None
    if len(columns) > len(policy.names):  # RLOO's divergence is a reward.
        *columns, kl = columns
        advantages = advantages[:, :-1]
        apart, rest = (kl, base) if kl_apart else (None, [r + c for r, c in zip(base, kl, strict=True)])
    elif kl_apart:
        rest = policy.gradients(zero, beta=0.0)
        apart = _less(base, rest)
    every = [c for gradients in [*columns, rest, *([] if apart is None else [apart])] for c in gradients if c.dim()]
    finite = torch.stack([c.flatten(1).isfinite().all(1) for c in every]).all(0)

    def whole(gradients: list[Tensor]) -> list[Tensor]:
        return [_where(finite, c * factor.to(c.dtype)) for c in gradients]

    return Shares(
        [whole(gradients) for gradients in columns],
        torch.where(finite[:, None], advantages, 0),
        None if apart is None else whole(apart),
        whole(rest),
        whole(base),
        finite,
    )


def _less(gradients: list[Tensor], base: list[Tensor]) -> list[Tensor]:
    return [g - b for g, b in zip(gradients, base, strict=True)]


def _where(finite: Tensor, gradient: Tensor) -> Tensor:
    """A cotangent [B, ...] with zeros where its completion's isn't finite."""
    if not gradient.dim():
        return gradient
    return torch.where(finite.view(-1, *(1 for _ in gradient.shape[1:])), gradient, 0)

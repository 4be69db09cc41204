"""One update of a trainer that generates: its completions' groups, or its rewards, as objectives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_jd.gramian import Jacobian
from hf_jd.gramian.rows import DenseRows
from hf_jd.metrics import Metrics
from hf_jd.objectives import Part
from hf_jd.trainer.cotangents import Cotangent, surrogates
from hf_jd.trainer.recording import Extra, Recorded
from hf_jd.trainer.rewards import Direction, PolicyLoss, directions, scalar
from hf_jd.trainer.split_update import SplitUpdate
from hf_jd.trainer.splitting import SplitRecorder, Whose

if TYPE_CHECKING:
    from hf_jd.trainer.generations import GeneratingMixin

KL = "kl"
"""The name of the divergence from the reference model as an objective."""


class Shares(NamedTuple):
    """The loss of a batch of completions by objective.

    Attributes:
        objectives: K objectives' cotangents at each output, [B, ...].
        advantages: [B, K]; see `directions`.
        apart: The cotangents of an objective that is no reward, if there is one.
        rest: Those of the part of the mean that no weighting sees.
        noise: Those that the objectives' were told from.
        finite: [B] (bool) whether a completion's are finite; what isn't is 0.
    """

    objectives: list[list[Tensor]]
    advantages: Tensor
    apart: list[Tensor] | None
    rest: list[Tensor]
    noise: list[Tensor]
    finite: Tensor


class GenerationRecorder(SplitRecorder):
    """Records micro-batches of completions, whose groups came with them; see SplitRecorder."""

    trainer: GeneratingMixin

    def _whose_now(self, whose: Whose) -> Whose:
        """What the batch as TRL has prepared it tells, which the list of prompts didn't."""
        groups = self.trainer.jd_groups_of_batch
        return whose if groups is None else Whose(groups, len(groups), None)

    def _rows(self, loss: Tensor, whose: Whose) -> Recorded:
        return super()._rows(loss, self._whose_now(whose))

    def _multiplied(self, loss: Tensor, whose: Whose, multipliers: Tensor | None) -> Tensor:
        return super()._multiplied(loss, self._whose_now(whose), multipliers)


class RewardRecorder(SplitRecorder):
    """Records micro-batches of completions by reward; see SplitRecorder."""

    trainer: GeneratingMixin

    def _rows(self, loss: Tensor, whose: Whose) -> Recorded:
        engine, policy, shares = self.trainer.engine(), *self._split_by_reward(loss)
        extra = None
        if any(bool(c.any()) for c in shares.rest):
            self.has_rest = True
            extra = Extra(loss.detach() * 0, engine.gradients(scalar(policy.outputs, shares.rest)))
        rows = [] if shares.apart is None else [self._gradient_row(policy, shares.apart)]
        jacobian = Jacobian.cat([self._rows_by_reward(policy, shares), *rows])
        counts = (shares.advantages != 0).sum(0)
        if shares.apart is not None:
            counts = torch.cat([counts, shares.finite.sum()[None]])
        return Recorded({}, None, [_part(counts, shares.finite)], jacobian, (~shares.finite).sum(), extra)

    def _multiplied(self, loss: Tensor, whose: Whose, multipliers: Tensor | None) -> Tensor:
        policy, shares = self._split_by_reward(loss)
        objectives = [*shares.objectives, *([] if shares.apart is None else [shares.apart])]
        each = [1.0] * len(objectives) if multipliers is None else multipliers.tolist()
        total = [c.clone() for c in shares.rest]
        for factor, gradients in zip(each, objectives, strict=True):
            total = [t + factor * c for t, c in zip(total, gradients, strict=True)]
        return scalar(policy.outputs, total)

    def _split_by_reward(self, loss: Tensor) -> tuple[PolicyLoss, Shares]:
        trainer = self.trainer
        trainer.jd_outputs.take()  # These are not read: the loss is split at what TRL makes of them.
        policy = trainer.take_policy()
        assert policy.loss is not None
        # Trainer has divided the loss by accumulation, and scaled it, since TRL computed it.
        factor = torch.autograd.grad(loss, policy.loss, retain_graph=True)[0]
        shares = _shares(policy, factor, getattr(trainer.args, "jd_kl", "mean") == "objective")
        if trainer.jd_args.jd_check and not trainer.jd_proved and bool(shares.finite.all()):
            policy.prove()
            trainer.jd_proved = True
        return policy, shares

    def _rows_by_reward(self, policy: PolicyLoss, shares: Shares) -> Jacobian:
        """The rows [K, n] of the rewards, by the fewest backward passes; logs how many these are."""
        trainer, count = self.trainer, len(shares.objectives)
        found = directions(shares.objectives, shares.advantages, shares.noise)
        passes = len(found) if 0 < len(found) < count else count
        trainer.jd_metrics.add(Metrics(("jd/reward_passes",), torch.tensor([float(passes)], dtype=torch.float64)))
        if passes == count:
            return Jacobian.cat([self._gradient_row(policy, gradients) for gradients in shares.objectives])
        rows = [self._rows_along(policy, direction, i + 1 == passes) for i, direction in enumerate(found)]
        return rows[0] if passes == 1 else rows[0] + rows[1]

    def _rows_along(self, policy: PolicyLoss, direction: Direction, last: bool) -> Jacobian:
        """The objectives' rows that are sums of completions', by one backward pass."""
        trainer, membership = self.trainer, direction.membership
        some = (membership != 0).any(0)
        if not some.any():
            return Jacobian(dict.fromkeys(trainer.trainable()), len(membership))
        ids, m = torch.where(some, some.cumsum(0) - 1, -1), int(some.sum())
        pairs = zip(policy.outputs, direction.gradients, strict=True)
        parts = [surrogates(Cotangent(output, gradient), ids, m) for output, gradient in pairs if output.dim()]
        losses = torch.stack([part.to(parts[0]) for part in parts]).sum(0)
        instances = trainer.engine().compute_jacobian(losses, ids, materialise=False, retain_graph=not last)
        return instances.combined(membership[:, some])

    def _gradient_row(self, policy: PolicyLoss, gradients: list[Tensor]) -> Jacobian:
        """The row of one objective, by a plain backward pass."""
        found = self.trainer.engine().gradients(scalar(policy.outputs, gradients))
        rows = {p: DenseRows(g.reshape(1, -1), p.shape) for p, g in found.items()}
        return Jacobian({p: rows.get(p) for p in self.trainer.trainable()}, 1)


class GenerationUpdate(SplitUpdate):
    """An update of completions, by their groups or rewards; see SplitUpdate."""

    trainer: GeneratingMixin

    def __init__(self, trainer: GeneratingMixin, model: nn.Module, batches: list[Any], alone: bool):
        super().__init__(trainer, model, batches, alone)
        if self.kind.of_rewards:
            apart = getattr(trainer.args, "jd_kl", "mean") == "objective"
            trainer.jd_loss_names = [*trainer.reward_func_names, *([KL] if apart else [])]

    def _make_recorder(self, num_items: Any, micro_batches: int) -> SplitRecorder:
        kind = RewardRecorder if self.kind.of_rewards else GenerationRecorder
        return kind(self.trainer, self.model, self.present, self._rows_fit())

    def _present_groups(self) -> Tensor | None:
        """All groups' ids: those of an update are not known before TRL has shuffled its completions."""
        if self.jd.jd_group_column is None:
            return None
        names = self.trainer.jd_group_names
        if names is None:
            raise ValueError("A stream's groups of prompts can't be known beforehand: list them with --jd_groups.")
        return torch.arange(len(names), device=self.trainer.args.device)

    def _multipliers(self) -> Tensor | None:
        if not self.kind.of_rewards:
            return super()._multipliers()
        trainer, step = self.trainer, self.trainer.state.global_step
        known = [trainer.jd_control.multiplier(name, step) for name in trainer.jd_loss_names]
        return torch.tensor(known, dtype=torch.float64)


def _shares(policy: PolicyLoss, factor: Tensor, kl_apart: bool) -> Shares:
    """Evaluates TRL's loss with no advantage, and with each reward's.

    Args:
        policy: The loss.
        factor: [] what its gradients are multiplied by.
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


def _part(counts: Tensor, finite: Tensor) -> Part:
    """Objectives by name; their losses' values are not known."""
    unknown = torch.full_like(counts, torch.nan, dtype=torch.float64)
    none = torch.full_like(counts, -1)
    names = torch.arange(len(counts), device=counts.device)
    return Part(unknown, none, none, names, counts, torch.ones_like(unknown), finite)

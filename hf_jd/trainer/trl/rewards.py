"""The policy loss of each reward, from one forward pass: cotangents at the log-probabilities, and their rows.

TRL's loss is a function of the completions' log-probabilities and advantages. With reward k's own advantages, it is
objective k, so TRL's own code, evaluated again on stored log-probabilities, gives each reward's cotangents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_jd.gramian import Jacobian
from hf_jd.metrics import Metrics
from hf_jd.objectives import Membership
from hf_jd.trainer.splitting.cotangents import Cotangent, split, surrogates, wide
from hf_jd.trainer.step.named_gradients import NamedLosses, NamedRecorder
from hf_jd.trainer.trl.directions import Direction, directions

if TYPE_CHECKING:
    from hf_jd.trainer.trl.generations import GeneratingMixin

ADVANTAGES_KEY = "jd_advantages"
"""The batch's key for the advantages [B, K], by reward."""


class PolicyLoss:
    """TRL's loss of one batch of completions, which can be evaluated again with other advantages.

    Args:
        trainer: Copied before TRL computes the loss, which advances counters and an entropy coefficient.
        model: As TRL's loss takes it.
        inputs: As TRL prepared them.
    """

    def __init__(self, trainer: GeneratingMixin, model: Any, inputs: Mapping[str, Any]):
        self._twin: Any = copy(trainer)  # logs and counts separately
        self._twin._metrics = {mode: defaultdict(list) for mode in ("train", "eval")}
        self._twin.accelerator = _Alone(trainer.accelerator)
        self._model, self._inputs = model, inputs
        self.advantages: Tensor = inputs[ADVANTAGES_KEY]
        self.names: list[str] = trainer.reward_func_names
        self.outputs: list[Tensor] = []
        self._leaves: list[Tensor] = []
        self.loss: Tensor | None = None

    def keep(self, outputs: Sequence[Any], loss: Tensor) -> None:
        """Store the inputs of the loss, and the loss as TRL computed it.

        Entropies that are only logged are left out: a cotangent of zeros would cost as much as any other.

        Args:
            outputs: Log-probabilities [B, T], entropies [B, T], and a router's loss []; all but the first may be None.
            loss: [] with a graph.
        """
        self.loss = loss
        leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in outputs]
        self._twin._get_per_token_logps_and_entropies = lambda *args, **kwargs: tuple(leaves)
        pairs = [(t, leaf) for t, leaf in zip(outputs, leaves, strict=True) if t is not None and t.requires_grad]
        read = torch.autograd.grad(loss, [t for t, _ in pairs], retain_graph=True, allow_unused=True) if pairs else ()
        pairs = [pair for pair, gradient in zip(pairs, read, strict=True) if gradient is not None]
        self.outputs, self._leaves = [t for t, _ in pairs], [leaf for _, leaf in pairs]

    def gradients(self, advantages: Tensor, **settings: Any) -> list[Tensor]:
        """Compute the gradient at each output with other advantages [B], and `settings` as the trainer's attributes.

        Raises:
            ValueError: The loss doesn't depend on the log-probabilities that TRL's own method returns.
        """
        twin = copy(self._twin)
        vars(twin).update(settings)
        with torch.enable_grad():
            loss = twin._compute_loss(self._model, {**self._inputs, "advantages": advantages})
        if not loss.requires_grad:
            raise ValueError(_bypass_message(self._twin))
        gradients = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(self._leaves, gradients, strict=True)]

    def prove(self) -> None:
        """Compare the repeated evaluation with the loss that TRL computed, and free the latter.

        Raises:
            ValueError: The gradients differ, or the loss depends on the model in other ways.
        """
        assert self.loss is not None
        again = self.gradients(self._inputs["advantages"])
        cotangents, rest = split(self.loss, self.outputs)
        by_output = {id(c.output): c.gradient for c in cotangents}
        for output, gradient in zip(self.outputs, again, strict=True):
            first = by_output.get(id(output), torch.zeros_like(output))
            if rest is not None or not torch.allclose(first, gradient, rtol=1e-3, atol=1e-3 * float(first.abs().max())):
                raise ValueError(_bypass_message(self._twin))


class _Alone:
    """An accelerator for a loss that only this process evaluates."""

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        return tensor

    gather_for_metrics = reduce = gather


def _bypass_message(trainer: Any) -> str:
    return (
        f"The loss of {type(trainer).__name__}, evaluated again on the log-probabilities of "
        "`_get_per_token_logps_and_entropies`, is different: it draws random numbers or reads the model outside that "
        "method, so no reward's part of it is known. Choose --jd_objectives instance, group or batch."
    )


class RewardLosses(NamedLosses):
    """The loss of a batch of completions by reward, and by divergence if that is an objective.

    Args:
        trainer: Has just computed the loss.
        loss: [] with a graph, as Trainer has divided and scaled it.
    """

    def __init__(self, trainer: GeneratingMixin, loss: Tensor):
        self._trainer, policy = trainer, trainer.take_policy()
        assert policy.loss is not None
        # Trainer has divided the loss by accumulation, and scaled it, since TRL computed it.
        factor = torch.autograd.grad(loss, policy.loss, retain_graph=True)[0]
        rewards, apart, rest, base = _by_reward(policy, trainer.kl_is_objective)
        every = [c for gradients in [*rewards, *apart, rest] for c in gradients if c.dim()]
        finite = torch.stack([c.flatten(1).isfinite().all(1) for c in every]).all(0)

        def whole(gradients: list[Tensor]) -> list[Tensor]:
            return [_masked(finite, c * factor.to(c.dtype)) for c in gradients]

        if trainer.jd_args.jd_check and not trainer.jd_proved and bool(finite.all()):
            policy.prove()
            trainer.jd_proved = True
        self._outputs, self._rest, self._noise = policy.outputs, whole(rest), whole(base)
        self._rewards, self._apart = ([whole(gradients) for gradients in several] for several in (rewards, apart))
        self._advantages = torch.where(finite[:, None], policy.advantages[:, : len(rewards)], 0)
        self.names, self.broken = trainer.objective_names() or [], (~finite).sum()
        self.counts = torch.cat([(self._advantages != 0).sum(0), *[finite.sum()[None] for _ in apart]])

    def rows(self, recorder: NamedRecorder) -> tuple[Jacobian, dict[nn.Parameter, Tensor]]:
        """Form the rows [K, n] of the rewards, and of the divergence if that is an objective; see `directions`."""
        extra = {}
        if any(bool(c.any()) for c in self._rest):
            extra = self._trainer.engine().gradients(scalar(self._outputs, self._rest))
        apart = [recorder.gradient_row(scalar(self._outputs, c)) for c in self._apart]
        return Jacobian.cat([self._rows_by_reward(recorder), *apart]), extra

    def weighted(self, weights: Tensor, members: Membership, rest: bool) -> Tensor:
        """See `NamedLosses`."""
        total = [c.clone() for c in self._rest]
        for factor, gradients in zip(weights.tolist(), [*self._rewards, *self._apart], strict=True):
            total = [t + factor * c for t, c in zip(total, gradients, strict=True)]
        return scalar(self._outputs, total)

    def release(self) -> None:
        """Free the graph."""
        del self._outputs, self._rewards, self._apart, self._rest, self._noise

    def _rows_by_reward(self, recorder: NamedRecorder) -> Jacobian:
        """Form the rows [K, n] of the rewards with the fewest backward passes, and log their number."""
        count, keep = len(self._rewards), [output.dim() > 0 for output in self._outputs]
        outputs, *rewards, noise = (  # A router's loss [] depends on no advantage.
            list(compress(gradients, keep)) for gradients in (self._outputs, *self._rewards, self._noise)
        )
        common = directions(rewards, self._advantages, noise)
        passes = len(common) if 0 < len(common) < count else count
        self._trainer.jd_metrics.add(Metrics(("jd/reward_passes",), torch.tensor([float(passes)], dtype=torch.float64)))
        if passes == count:
            return Jacobian.cat([recorder.gradient_row(scalar(self._outputs, c)) for c in self._rewards])
        rows = [self._rows_along(recorder, outputs, direction, i + 1 == passes) for i, direction in enumerate(common)]
        return rows[0] if passes == 1 else rows[0] + rows[1]

    def _rows_along(
        self, recorder: NamedRecorder, outputs: Sequence[Tensor], direction: Direction, last: bool
    ) -> Jacobian:
        """Form the objectives' rows as weighted sums of completions' rows, with one backward pass."""
        membership = direction.membership
        some = (membership != 0).any(0)
        if not some.any():
            return recorder.jacobian_of({}, len(membership))
        ids, m = torch.where(some, some.cumsum(0) - 1, -1), int(some.sum())
        pairs = zip(outputs, direction.gradients, strict=True)
        parts = [surrogates(Cotangent(output, gradient), ids, m) for output, gradient in pairs]
        losses = torch.stack([part.to(parts[0]) for part in parts]).sum(0)
        instances = self._trainer.engine().compute_jacobian(losses, ids, materialise=False, retain_graph=not last)
        return instances.combined(membership[:, some])


def _by_reward(
    policy: PolicyLoss, kl_is_objective: bool
) -> tuple[list[list[Tensor]], list[list[Tensor]], list[Tensor], list[Tensor]]:
    """Evaluate TRL's loss with each reward's advantages, and without any.

    Returns:
        The cotangents at each output [B, ...]: of each reward; of the divergence, if that is an objective; of the part
        of the mean that no weighting sees; and those without advantages, which were subtracted from all others.
    """
    zero = torch.zeros_like(policy.advantages[:, 0])
    base = policy.gradients(zero)
    rewards = [_subtracted(policy.gradients(column), base) for column in policy.advantages.T]
    if len(rewards) > len(policy.names):  # RLOO's divergence is a reward.
        *rewards, kl = rewards
        if kl_is_objective:
            return rewards, [kl], base, base
        return rewards, [], [b + c for b, c in zip(base, kl, strict=True)], base
    if kl_is_objective:
        rest = policy.gradients(zero, beta=0.0)
        return rewards, [_subtracted(base, rest)], rest, base
    return rewards, [], base, base


def _subtracted(gradients: list[Tensor], base: list[Tensor]) -> list[Tensor]:
    return [g - b for g, b in zip(gradients, base, strict=True)]


def _masked(finite: Tensor, gradient: Tensor) -> Tensor:
    """Return a cotangent [B, ...] with zeros for completions whose own isn't finite."""
    return torch.where(wide(finite, gradient), gradient, 0) if gradient.dim() else gradient


def scalar(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return a scalar whose gradient is the pullback of the cotangents; its value is 0."""
    parts = []
    for output, gradient in zip(outputs, gradients, strict=True):
        ids = torch.zeros(output.shape[:1], dtype=torch.int64, device=output.device)
        parts.append(surrogates(Cotangent(output, gradient), ids, 1).sum())
    return torch.stack([part.to(parts[0]) for part in parts]).sum()

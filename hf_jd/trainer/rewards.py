"""The policy loss of each reward, from one forward pass: cotangents at the log-probabilities, and their rows.

TRL's loss is a function of the completions' log-probabilities and advantages. With reward k's own advantages, it is
objective k, so TRL's own code, evaluated again on stored log-probabilities, gives each reward's cotangents. On-policy,
these are multiples of each other within each completion: the rows of the completions, from one backward pass, give the
rows of any number of rewards. Where clipping treats good and bad completions differently, two passes are enough.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_jd.trainer.cotangents import Cotangent, split, surrogates

if TYPE_CHECKING:
    from hf_jd.trainer.generations import GeneratingMixin

ADVANTAGES_KEY = "jd_advantages"
"""The batch's key for the advantages [B, K], by reward."""

ROUNDING = 64
"""The rounding units by which cotangents of TRL's loss may differ from being multiples of each other."""


class Direction(NamedTuple):
    """One cotangent per completion, of which some objectives have multiples.

    Attributes:
        gradients: For each output, [B, ...].
        membership: [K, B] the multiples.
    """

    gradients: list[Tensor]
    membership: Tensor


class PolicyLoss:
    """TRL's loss of one batch of completions, to evaluate again with other advantages.

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
        """Stores the inputs of the loss, and the loss as TRL computed it.

        Args:
            outputs: Log-probabilities [B, T], entropies [B, T], and a router's loss []; all but the first may be None.
            loss: [] with a graph.
        """
        self.loss = loss
        leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in outputs]
        self._twin._get_per_token_logps_and_entropies = lambda *args, **kwargs: tuple(leaves)
        pairs = [(t, leaf) for t, leaf in zip(outputs, leaves, strict=True) if t is not None and t.requires_grad]
        self.outputs, self._leaves = [t for t, _ in pairs], [leaf for _, leaf in pairs]

    def gradients(self, advantages: Tensor, **settings: Any) -> list[Tensor]:
        """Computes the gradient at each output with other advantages [B], and `settings` as the trainer's attributes.

        Raises:
            ValueError: The loss doesn't depend on the log-probabilities that TRL's own method returns.
        """
        twin = copy(self._twin)
        vars(twin).update(settings)
        with torch.enable_grad():
            loss = twin._compute_loss(self._model, {**self._inputs, "advantages": advantages})
        if not loss.requires_grad:
            raise ValueError(_past_the_method(self._twin))
        gradients = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(self._leaves, gradients, strict=True)]

    def prove(self) -> None:
        """Compares the repeated evaluation with the loss that TRL computed, and frees the latter.

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
                raise ValueError(_past_the_method(self._twin))


class _Alone:
    """An accelerator for a loss that only this process evaluates."""

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_for_metrics(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        return tensor


def _past_the_method(trainer: Any) -> str:
    return (
        f"The loss of {type(trainer).__name__}, evaluated again on the log-probabilities of "
        "`_get_per_token_logps_and_entropies`, is different: it draws random numbers or reads the model outside that "
        "method, so no reward's part of it is known. Choose --jd_objectives instance, group or batch."
    )


def directions(parts: Sequence[Sequence[Tensor]], advantages: Tensor, noise: Sequence[Tensor]) -> list[Direction]:
    """Finds as few cotangents per completion as span every objective's: one, or two by the sign of the advantage.

    Args:
        parts: K objectives' cotangents at each output, [B, ...].
        advantages: [B, K]; where one is 0, so is that objective's cotangent.
        noise: For each output, cotangents [B, ...] whose rounding errors are in `parts`.

    Returns:
        The directions; empty if more than two are needed.
    """
    stacked = [torch.stack(list(of_output)) for of_output in zip(*parts, strict=True)]  # [K, B, ...]
    advantages = advantages.to(stacked[0].dtype)
    tolerances = [_tolerance(c, n) for c, n in zip(stacked, noise, strict=True)]
    positive = _unit(stacked, advantages, 1)
    negative = _unit(stacked, advantages, -1)
    up, down = advantages.T.clamp(min=0), advantages.T.clamp(max=0)
    for c, plus, minus, tolerance in zip(stacked, positive, negative, tolerances, strict=True):
        fitted = _wide(up, c) * plus + _wide(down, c) * minus
        if ((fitted - c).abs() > tolerance).any():
            return []
    largest = advantages.abs().amax(1)
    has_both = (advantages > 0).any(1) & (advantages < 0).any(1)
    same = all(
        not (has_both & _any((_wide(largest, p) * (p - m)).abs() > tolerance)).any()
        for p, m, tolerance in zip(positive, negative, tolerances, strict=True)
    )
    if not same:
        return [Direction(positive, up), Direction(negative, down)]
    is_up = (advantages > 0).any(1)
    return [
        Direction(
            [torch.where(_wide(is_up, p), p, m) for p, m in zip(positive, negative, strict=True)], advantages.T.clone()
        )
    ]


def _unit(stacked: Sequence[Tensor], advantages: Tensor, sign: int) -> list[Tensor]:
    """Returns each completion's cotangent per unit of advantage of one sign, from its largest advantage; else 0."""
    largest, which = (sign * advantages).max(1)
    rows = torch.arange(len(which), device=which.device)
    scale = torch.where(largest > 0, sign / largest.clamp(min=torch.finfo(largest.dtype).tiny), 0)
    return [_wide(scale, c[0]).to(c.dtype) * c[which, rows] for c in stacked]


def _tolerance(stacked: Tensor, noise: Tensor) -> Tensor:
    """Returns the rounding error [B, 1, ...] of each completion's cotangents [K, B, ...]."""
    size = stacked.abs().amax(0) + noise.abs()
    size = size.flatten(1).amax(1) if size[0].numel() else size.new_zeros(len(size))
    return _wide(ROUNDING * torch.finfo(stacked.dtype).eps * size, noise)


def _any(where: Tensor) -> Tensor:
    """Returns whether any entry of each [B, ...] is true: [B]."""
    return where.flatten(1).any(1)


def _wide(leading: Tensor, like: Tensor) -> Tensor:
    """Appends dimensions of size 1, up to the number of another tensor's."""
    return leading.view(leading.shape + (1,) * (like.dim() - leading.dim()))


def scalar(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Returns a scalar whose gradient is the pullback of the cotangents; its value is 0."""
    parts = []
    for output, gradient in zip(outputs, gradients, strict=True):
        ids = torch.zeros(output.shape[:1], dtype=torch.int64, device=output.device)
        parts.append(surrogates(Cotangent(output, gradient), ids, 1).sum())
    return torch.stack([part.to(parts[0]) for part in parts]).sum()

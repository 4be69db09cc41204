"""Add to `.grad`, or set it aside: it may hold a gradient from a stream that ended in mid-accumulation."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def accumulate(gradients: Mapping[nn.Parameter, Tensor]) -> None:
    """Add to `.grad`."""
    for p, gradient in gradients.items():
        p.grad = gradient if p.grad is None else p.grad + gradient


def added(parts: Iterable[Mapping[nn.Parameter, Tensor]]) -> dict[nn.Parameter, Tensor]:
    """Add up gradients."""
    total: dict[nn.Parameter, Tensor] = {}
    for part in parts:
        for p, gradient in part.items():
            total[p] = total[p] + gradient if p in total else gradient
    return total


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Return whether all gradients are finite."""
    return not gradients or bool(torch.stack(torch._foreach_norm(list(gradients))).isfinite().all())


@contextmanager
def set_aside(
    parameters: Iterable[nn.Parameter], instead: Mapping[nn.Parameter, Tensor] | None = None
) -> Generator[dict[nn.Parameter, Tensor]]:
    """Set `.grad` aside during backward passes.

    Args:
        parameters: The trainable ones.
        instead: What `.grad` is in their place; by default, None.

    Yields:
        An empty dict, which gets their `.grad` on exit, when the one before is restored.
    """
    before, instead = {p: p.grad for p in parameters}, instead or {}
    for p in before:
        p.grad = instead.get(p)
    gradients: dict[nn.Parameter, Tensor] = {}
    try:
        yield gradients
        gradients.update({p: p.grad for p in before if p.grad is not None})
    finally:
        for p, gradient in before.items():
            p.grad = gradient


class ShownGradients:
    """What `.grad` is while a user's own `training_step` runs: the gradient of the update's losses so far.

    The rows themselves become `.grad` at the end of the update. In between, a step may read it, as adversarial training
    does, but not change it.

    Args:
        active: Whether there is such a step; otherwise, `.grad` remains None.
    """

    def __init__(self, active: bool):
        self.active = active
        self.sums: dict[nn.Parameter, Tensor] = {}
        self._versions: dict[nn.Parameter, int] = {}
        self._changed = False

    def add(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Add the gradient of one more loss, by parameter."""
        if not self.active:
            return
        self._changed |= self.differ_from({p: p.grad for p in [*self.sums, *gradients] if p.grad is not None})
        accumulate(gradients)
        self.sums.update({p: p.grad for p in gradients if p.grad is not None})
        self._versions = {p: gradient._version for p, gradient in self.sums.items()}

    def differ_from(self, gradients: Mapping[nn.Parameter, Tensor]) -> bool:
        """Return whether a step added others to these, or changed or removed some."""
        more = any(p not in self.sums and bool(gradient.any()) for p, gradient in gradients.items())
        same = (gradients.get(p) is g and g._version == self._versions[p] for p, g in self.sums.items())
        return self._changed or more or not all(same)

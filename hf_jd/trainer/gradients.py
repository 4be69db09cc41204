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
def set_aside(parameters: Iterable[nn.Parameter]) -> Generator[dict[nn.Parameter, Tensor]]:
    """Set `.grad` aside during backward passes.

    Yields:
        An empty dict, which gets their gradients on exit, when `.grad` is restored.
    """
    before = {p: p.grad for p in parameters}
    for p in before:
        p.grad = None
    gradients: dict[nn.Parameter, Tensor] = {}
    try:
        yield gradients
        gradients.update({p: p.grad for p in before if p.grad is not None})
    finally:
        for p, gradient in before.items():
            p.grad = gradient

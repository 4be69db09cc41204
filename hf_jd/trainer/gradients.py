"""`.grad`, where a stream that ended in mid-accumulation may have left something: added to, or left as it was."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def accumulate(gradients: Mapping[nn.Parameter, Tensor]) -> None:
    """Adds to `.grad`."""
    for p, gradient in gradients.items():
        p.grad = gradient if p.grad is None else p.grad + gradient


def added(parts: Iterable[Mapping[nn.Parameter, Tensor]]) -> dict[nn.Parameter, Tensor]:
    """The sums of gradients."""
    total: dict[nn.Parameter, Tensor] = {}
    for part in parts:
        for p, gradient in part.items():
            total[p] = total[p] + gradient if p in total else gradient
    return total


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether no gradient holds an infinity or a NaN."""
    return not gradients or bool(torch.stack(torch._foreach_norm(list(gradients))).isfinite().all())


@contextmanager
def set_aside(parameters: Iterable[nn.Parameter]) -> Generator[dict[nn.Parameter, Tensor]]:
    """Gives backward passes a `.grad` of their own.

    Yields:
        An empty dict, which holds their gradients at the end; `.grad` is then as it was before.
    """
    before = {p: p.grad for p in parameters}
    for p in before:
        p.grad = None
    found: dict[nn.Parameter, Tensor] = {}
    try:
        yield found
        found.update({p: p.grad for p in before if p.grad is not None})
    finally:
        for p, gradient in before.items():
            p.grad = gradient

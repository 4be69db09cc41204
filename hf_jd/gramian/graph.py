"""Gradients of a scalar that leave `.grad` and the graph as they were found."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Differentiator:
    """Differentiates the losses of one step, with reentrant activation checkpointing or without.

    Reentrant checkpointing hides its part of the graph and refuses gradients with regard to given inputs: there, a
    plain `.backward()` runs, and `.grad` is put back afterwards.

    Args:
        touched: With reentrant checkpointing, the leaves whose `.grad` a plain backward may touch; else None.
    """

    def __init__(self, touched: Iterable[Tensor] | None):
        self._touched = touched if touched is None else list(dict.fromkeys(touched))

    def gradients(self, scalar: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """d scalar / d input for each input; None for those it does not depend on. The graph is kept."""
        if self._touched is None:
            return list(torch.autograd.grad(scalar, inputs, retain_graph=True, allow_unused=True))
        saved = {p: p.grad for p in self._touched}
        try:
            for p in saved:
                p.grad = None
            scalar.backward(retain_graph=True)
            return [tensor.grad for tensor in inputs]
        finally:
            for p, grad in saved.items():
                p.grad = grad


def walk(losses: Tensor) -> tuple[bool, list[Tensor]]:
    """Whether a reentrant checkpoint stands in the graph, and the graph's leaves."""
    reentrant, leaves, seen = False, [], set()
    stack = [losses.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reentrant = reentrant or node.name() == "CheckpointFunctionBackward"
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack.extend(edge for edge, _ in node.next_functions)
    return reentrant, leaves

"""Differentiate a scalar without touching `.grad`, and read a graph beforehand."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from hf_jd.gramian.sharding import Lockstep
from hf_jd.gramian.taps import ModuleTap


class Differentiator:
    """The derivatives of one step's losses, with or without reentrant activation checkpointing.

    Reentrant checkpointing hides its part of the graph and refuses gradients with respect to chosen inputs: a plain
    `.backward()` runs instead, and `.grad` is restored afterwards.

    Args:
        touched: With reentrant checkpointing, the leaves whose `.grad` a plain backward may touch; else None.
        whole: The leaves of the graph that stand for sharded parameters.
        lockstep: Keeps the processes' passes in step, if parameters are sharded.
        everywhere: A tensor on which every module depends: with it among the inputs, a pass skips no module.

    Raises:
        ValueError: Parameters are sharded, and checkpointing is reentrant.
    """

    def __init__(
        self,
        touched: Iterable[Tensor] | None,
        whole: Mapping[nn.Parameter, nn.Parameter] | None = None,
        lockstep: Lockstep | None = None,
        everywhere: Tensor | None = None,
    ):
        self._touched = touched if touched is None else list(dict.fromkeys(touched))
        self._whole: Mapping[Any, Tensor] = whole or {}
        self._lockstep, self._everywhere = lockstep, everywhere
        if lockstep is not None and touched is not None:
            raise ValueError(
                "reentrant activation checkpointing doesn't work with sharded parameters: use FSDP's own "
                "checkpointing, or gradient_checkpointing_kwargs={'use_reentrant': False}."
            )

    def gradients(self, scalar: Tensor, inputs: Sequence[Tensor], retain_graph: bool = True) -> list[Tensor | None]:
        """Compute d scalar / d input for each input; None for inputs that it does not depend on.

        Args:
            scalar: 0-d.
            inputs: Leaves of the graph.
            retain_graph: False frees the graph along the way, except with reentrant checkpointing or sharded
                parameters.

        Raises:
            ValueError: Another backward has freed the graph.
        """
        if self._lockstep is not None:
            self._lockstep.announce()
            return self._full_pass(scalar, inputs)
        if self._touched is None:
            with _named_if_freed():
                return list(torch.autograd.grad(scalar, inputs, retain_graph=retain_graph, allow_unused=True))
        saved = {p: p.grad for p in self._touched}
        try:
            for p in saved:
                p.grad = None
            scalar.backward(retain_graph=True)
            return [tensor.grad for tensor in inputs]
        finally:
            for p, grad in saved.items():
                p.grad = grad

    def finish(self, scalar: Tensor) -> None:
        """Wait for the passes of other processes; `scalar` depends on the model as the losses do."""
        if self._lockstep is not None:
            while self._lockstep.others():
                self._full_pass(scalar, [])

    def _full_pass(self, scalar: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        assert self._everywhere is not None
        leaves = [*(self._whole.get(tensor, tensor) for tensor in inputs), self._everywhere]
        gradients: list[Tensor | None] = list(torch.autograd.grad(scalar, leaves, retain_graph=True, allow_unused=True))
        return gradients[:-1]


@contextmanager
def _named_if_freed() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise ValueError(
            "another backward has freed the graph of these losses: compute the Gramian before it, run that backward "
            "with retain_graph=True, or compute the losses again."
        ) from error


@dataclass
class Graph:
    """The contents of the graph of some losses.

    Attributes:
        reentrant: Whether it has a reentrant checkpoint, which hides its part of the graph.
        leaves: The tensors that require grad.
        taps: The nodes of engines' taps, each with its `tap` and the `shapes` of its outputs.
    """

    reentrant: bool = False
    leaves: list[Any] = field(default_factory=list)
    taps: list[Any] = field(default_factory=list)


def walk(losses: Tensor) -> Graph:
    """Walk the graph of the losses, in less than a microsecond per node."""
    graph = Graph()
    stack: list[Any] = [losses.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        edges = node.next_functions
        if not edges and hasattr(node, "variable"):
            graph.leaves.append(node.variable)
        elif isinstance(node, BackwardCFunction):
            graph.reentrant = graph.reentrant or node.name() == "CheckpointFunctionBackward"
            if isinstance(getattr(node, "tap", None), ModuleTap):
                graph.taps.append(node)
        for edge, _ in edges:
            if edge is not None and edge not in seen:
                seen.add(edge)
                stack.append(edge)
    return graph

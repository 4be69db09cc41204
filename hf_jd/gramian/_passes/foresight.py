"""Read the graph of a step's losses before its backward.

A reentrant checkpoint hides its part of the graph, and has to be known in advance. And a plain step frees activations
as its backward goes: the engine can do so, too, once there is nothing left to learn, because each parameter that the
losses depend on has a tap, used in a way and a layout that were proved.

The graph is walked once for each shape that it takes. Autograd numbers its nodes: if the same taps have seen the same
calls, at the same distances before the losses as in a graph that was walked, the program has taken the same path.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_jd.gramian._passes.check import Checker, is_due
from hf_jd.gramian._passes.coverage import Coverage
from hf_jd.gramian._passes.graph import Graph, walk
from hf_jd.gramian._rules.plan import Plan
from hf_jd.gramian.layouts import AXES, Batch
from hf_jd.gramian.taps import ModuleTap

Place = tuple[ModuleTap, tuple[bool, ...], int]  # a tap, the modes of a call, and its number of nodes before the losses
REMEMBERED = 8  # how many paths through a program to remember


@dataclass
class Outlook:
    """What is known about a backward in advance.

    Attributes:
        touched: With a reentrant checkpoint, the visible leaves of the graph; else None.
        is_last: Whether a backward to the taps will give all rows of the losses, so that no other has to follow.
        is_settled: Whether it is the last one, and each use of a parameter was proved by a gradient other than zero.
    """

    touched: list[Any] | None = None
    is_last: bool = False
    is_settled: bool = False


@dataclass
class _Path:
    """A walked graph without reentrant checkpoints; if its backward is settled, for which batches."""

    places: list[Place]
    names: dict[nn.Parameter, str]
    shapes: list[torch.Size] = field(default_factory=list)
    instances: int = 0
    distinguish: bool = False
    settled: bool = False
    batch_first: bool = False

    def is_settled(self, shapes: list[torch.Size], batch: Batch) -> bool:
        """Return whether the backward of this batch is settled, too."""
        if not self.settled or batch.segments.distinguish != self.distinguish:
            return False
        if batch.instances == self.instances and shapes == self.shapes:
            return True
        n = batch.instances
        return self.batch_first and all(
            len(a) == len(b) and a[0] == n for a, b in zip(shapes, self.shapes, strict=True)
        )


class Foresight:
    """Predictions about a backward, read from its graph.

    Args:
        plan: What the engine learnt in earlier steps.
        coverage: Which tap gives which parameter's rows.
        checker: None if rows need no proof.
    """

    def __init__(self, plan: Plan, coverage: Coverage, checker: Checker | None):
        self._plan, self._coverage, self._checker = plan, coverage, checker
        self._paths: deque[_Path] = deque(maxlen=REMEMBERED)

    def look(self, losses: Tensor, batch: Batch | None = None) -> Outlook:
        """Read the graph of some losses.

        Args:
            losses: [R], or a scalar.
            batch: The instances that they belong to, to ask whether a backward to the taps is the last one.
        """
        places, shapes = self._places(losses)
        path = next((p for p in self._paths if p.names is self._coverage.names and p.places == places), None)
        if path is not None and batch is None:
            return Outlook()
        if path is not None and batch is not None and path.is_settled(shapes, batch):
            return Outlook(is_last=True, is_settled=True)
        graph = walk(losses)
        if graph.reentrant:
            return Outlook(touched=graph.leaves)
        if path is None:
            path = _Path(places, self._coverage.names)
            if places:
                self._paths.append(path)
        if batch is None or not self._is_last(graph, batch):
            return Outlook()
        path.shapes, path.instances, path.distinguish = shapes, batch.instances, batch.segments.distinguish
        path.settled, path.batch_first = self._is_settled(graph, batch)
        return Outlook(is_last=True, is_settled=path.settled)

    def forget(self) -> None:
        """Mark all paths as unsettled: decisions may have changed."""
        for path in self._paths:
            path.settled = False

    def _places(self, losses: Tensor) -> tuple[list[Place], list[torch.Size]]:
        """Return the places and shapes of all forwards since the last Gramian; empty if some were not remembered."""
        taps, node = self._coverage.every_tap, losses.grad_fn
        if node is None or any(tap.calls != len(tap.forwards) for tap in taps):
            return [], []
        last = node._sequence_nr()
        forwards = [(tap, forward) for tap in taps for forward in tap.forwards]
        return [(tap, f.call.modes, last - f.place) for tap, f in forwards], [f.shape for _, f in forwards]

    def _is_last(self, graph: Graph, batch: Batch) -> bool:
        if self._plan.individual:
            return False
        taps, tapped = set(self._coverage.taps), set()
        for node in graph.taps:
            if node.tap not in taps:  # another engine's
                continue
            for shape in node.shapes:
                use = self._plan.past_use(node.tap, node.call.modes, shape, batch)
                # Methods that call a module again may fail for new shapes, and leave its parameters to tier 3.
                if use is None or not use.is_closed:
                    return False
                layout = use.layout_for(shape[:-1] or shape, batch.instances)
                if layout is None or (self._checker and any(is_due(use, p, layout) for p in node.targets.values())):
                    return False
            tapped |= set(node.targets.values())
        if self._checker and not self._checker.asleep.isdisjoint(tapped):
            return False
        leaves = set(graph.leaves)
        return all(p in tapped or p not in leaves for p in self._coverage.names)

    def _is_settled(self, graph: Graph, batch: Batch) -> tuple[bool, bool]:
        """Return whether each use was proved and each parameter has a tap; and whether all layouts are batch first."""
        taps, tapped, settled, batch_first = set(self._coverage.taps), set(), True, True
        for node in graph.taps:
            if node.tap not in taps:
                continue
            settled = settled and len(node.shapes) == 1
            for shape in node.shapes:
                use = self._plan.past_use(node.tap, node.call.modes, shape, batch)
                assert use is not None
                layout = use.layout_for(shape[:-1] or shape, batch.instances)
                batch_first = batch_first and layout is AXES[0] and use.layout is AXES[0]
                entries = ((p, layout, use.module.training) for p in node.targets.values())
                settled = settled and (self._checker is None or all(entry in use.proved for entry in entries))
            tapped |= set(node.targets.values())
        return settled and self._coverage.names.keys() <= tapped, batch_first

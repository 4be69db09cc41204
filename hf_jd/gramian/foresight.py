"""What the graph of a step's losses tells before its backward.

A reentrant checkpoint hides its part of the graph, and has to be known beforehand. And a plain step frees activations
as its backward goes: the engine can do so too, once nothing is left to be found out, where each parameter that the
losses depend on is met by a tap, at a place and in a layout that were proved.

The graph is walked once for each shape that it takes. Autograd numbers its nodes: where the same taps have met the same
calls, as many nodes before the losses as in a graph that was walked, the program has taken the same way through it.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_jd.gramian.check import Checker, is_due
from hf_jd.gramian.coverage import Coverage
from hf_jd.gramian.graph import Graph, walk
from hf_jd.gramian.layouts import AXES, Batch
from hf_jd.gramian.plan import Plan
from hf_jd.gramian.taps import ModuleTap

Place = tuple[
    ModuleTap, tuple[bool, ...], int
]  # what a tap has met, in which modes, and how many nodes before the losses
REMEMBERED = 8  # ways through a program


@dataclass
class Outlook:
    """What is known of a backward before it.

    Attributes:
        touched: With a reentrant checkpoint, the leaves of the graph, as far as it shows them; else None.
        is_last: Whether a backward to the taps will bring all rows of the losses, so that none has to follow.
        is_settled: Whether it is the last one, and each use of a parameter was proved by a gradient that is not zero.
    """

    touched: list[Any] | None = None
    is_last: bool = False
    is_settled: bool = False


@dataclass
class _Way:
    """A graph without reentrant checkpoints that was walked; where a backward is settled, for which batches."""

    places: list[Place]
    names: dict[nn.Parameter, str]
    shapes: list[torch.Size] = field(default_factory=list)
    instances: int = 0
    distinguish: bool = False
    settled: bool = False
    batch_first: bool = False

    def is_settled(self, shapes: list[torch.Size], batch: Batch) -> bool:
        """Whether a backward of this batch is settled, too."""
        if not self.settled or batch.segments.distinguish != self.distinguish:
            return False
        if batch.instances == self.instances and shapes == self.shapes:
            return True
        n = batch.instances
        return self.batch_first and all(
            len(a) == len(b) and a[0] == n for a, b in zip(shapes, self.shapes, strict=True)
        )


class Foresight:
    """Looks at graphs.

    Args:
        plan: What was learnt in the steps before.
        coverage: Which tap brings which parameter.
        checker: None where rows need no proof.
    """

    def __init__(self, plan: Plan, coverage: Coverage, checker: Checker | None):
        self._plan, self._coverage, self._checker = plan, coverage, checker
        self._ways: deque[_Way] = deque(maxlen=REMEMBERED)

    def look(self, losses: Tensor, batch: Batch | None = None) -> Outlook:
        """What the graph of some losses tells.

        Args:
            losses: [R], or a scalar.
            batch: The instances behind them, where it is asked whether a backward to the taps is the last one.
        """
        places, shapes = self._places(losses)
        way = next((way for way in self._ways if way.names is self._coverage.names and way.places == places), None)
        if way is not None and batch is None:
            return Outlook()
        if way is not None and batch is not None and way.is_settled(shapes, batch):
            return Outlook(is_last=True, is_settled=True)
        graph = walk(losses)
        if graph.reentrant:
            return Outlook(touched=graph.leaves)
        if way is None:
            way = _Way(places, self._coverage.names)
            if places:
                self._ways.append(way)
        if batch is None or not self._is_last(graph, batch):
            return Outlook()
        way.shapes, way.instances, way.distinguish = shapes, batch.instances, batch.segments.distinguish
        way.settled, way.batch_first = self._is_settled(graph, batch)
        return Outlook(is_last=True, is_settled=way.settled)

    def forget(self) -> None:
        """Looks anew at what is settled: decisions may have changed."""
        for way in self._ways:
            way.settled = False

    def _places(self, losses: Tensor) -> tuple[list[Place], list[torch.Size]]:
        """What the forwards since the last Gramian have met, seen from the losses; empty where that is not all."""
        taps, node = self._coverage.every_tap, losses.grad_fn
        if node is None or any(tap.calls != len(tap.forwards) for tap in taps):
            return [], []
        last = node._sequence_nr()
        met = [(tap, forward) for tap in taps for forward in tap.forwards]
        return [(tap, f.call.modes, last - f.place) for tap, f in met], [f.shape for _, f in met]

    def _is_last(self, graph: Graph, batch: Batch) -> bool:
        if self._plan.individual:
            return False
        own, tapped = set(self._coverage.taps), set()
        for node in graph.taps:
            if node.tap not in own:
                continue
            for shape in node.shapes:
                use = self._plan.known_use(node.tap, node.call.modes, shape, batch)
                # Methods that call a module again may give up at a call's shapes, and leave its parameters to tier 3.
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
        """Whether each use was proved and each parameter is met; and whether all tensors are read batch first."""
        own, tapped, settled, batch_first = set(self._coverage.taps), set(), True, True
        for node in graph.taps:
            if node.tap not in own:
                continue
            settled = settled and len(node.shapes) == 1
            for shape in node.shapes:
                use = self._plan.known_use(node.tap, node.call.modes, shape, batch)
                assert use is not None
                layout = use.layout_for(shape[:-1] or shape, batch.instances)
                batch_first = batch_first and layout is AXES[0] and use.layout is AXES[0]
                entries = ((p, layout, use.module.training) for p in node.targets.values())
                settled = settled and (self._checker is None or all(entry in use.proved for entry in entries))
            tapped |= set(node.targets.values())
        return settled and self._coverage.names.keys() <= tapped, batch_first

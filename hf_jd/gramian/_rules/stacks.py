"""Form and multiply the rows of many small parameters of the same shape together: one kernel for many layers.

With small layers, a step spends its time launching operations. So the tensors of small layers wait during a backward
(`Stacker`) until there are enough of them, and become the rows of all these layers in one product (`Stack`).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from hf_jd.gramian._rules.linear import linear, transposed_linear
from hf_jd.gramian._rules.rule import Rule
from hf_jd.gramian.layouts import Batch
from hf_jd.gramian.rows import CHUNK, DenseRows, Rows, accumulation_dtype, combine, inner
from hf_jd.gramian.taps import TapEvent

STACKABLE = {linear, transposed_linear}  # rules that read only the shapes of a layer's parameters
SMALL, SMALL_ON_CPU = 1024 * 1024, 16 * 1024  # elements of a layer's tensors, or of its rows, up to which they wait
WAITING = 4 * 1024 * 1024  # elements that may wait: a plain backward would have freed these activations


class Stack:
    """The rows of L parameters of the same shape, side by side.

    Args:
        members: The L parameters.
        rows: [R, L * numel]; its `shape` and `transposed` describe a single parameter.
    """

    def __init__(self, members: Sequence[nn.Parameter], rows: DenseRows):
        self.members, self.rows = members, rows

    @cached_property
    def _places(self) -> dict[nn.Parameter, int]:
        return {p: i for i, p in enumerate(self.members)}

    def __len__(self) -> int:
        return len(self.members)

    @property
    def nbytes(self) -> int:
        """The memory of the rows, in bytes."""
        return self.rows.nbytes

    def gramian(self) -> Tensor:
        """Compute the sum of the members' Gramians: float64 [R, R]."""
        return self.rows.gramian()

    def gramians(self) -> Tensor:
        """Compute each member's Gramian: float64 [L, R, R]."""
        parts = self._parts()
        if parts.shape[2] <= CHUNK:
            parts = parts.to(accumulation_dtype(parts))
            return torch.bmm(parts, parts.mT).double()
        return torch.stack([inner(part, part) for part in parts])

    def weighted_sums(self, weights: Tensor) -> Sequence[Tensor]:
        """Compute sum_i w_i row_i of each member, for common weights [R] or separate ones [L, R]."""
        if weights.dim() == 1:
            total = combine(weights, self.rows.rows)
        else:
            total = torch.cat([combine(w, part) for w, part in zip(weights, self._parts(), strict=True)])
        shape = self.rows.shape
        if self.rows.transposed:
            return total.view(len(self), *shape[::-1]).transpose(1, 2).contiguous().unbind()
        return total.view(len(self), *shape).unbind()

    def apart(self, member: nn.Parameter) -> DenseRows:
        """Return the rows of one member."""
        size, place = self.rows.shape.numel(), self._places[member]
        return self.rows.like(self.rows.rows[:, place * size : (place + 1) * size])

    def map(self, function: Callable[[Rows], Rows]) -> "Stack":
        """Apply a function of whole rows to the stack, which may change the objectives."""
        rows = function(self.rows)
        assert isinstance(rows, DenseRows)
        return Stack(self.members, rows)

    def matches(self, other: "Stack | Rows | None") -> bool:
        """Return whether the other stack holds the same parameters in the same order."""
        return (
            isinstance(other, Stack)
            and other.rows.transposed == self.rows.transposed
            and len(other) == len(self)
            and all(a is b for a, b in zip(self.members, other.members, strict=True))
        )

    def _parts(self) -> Tensor:
        """Return the rows of each member, [L, R, numel]."""
        return self.rows.rows.unflatten(1, (len(self), -1)).transpose(0, 1)


class Stacker:
    """Collects the tensors and rows of small layers, and returns their rows in stacks.

    Args:
        batch: The instances of the step.
    """

    def __init__(self, batch: Batch):
        self._batch = batch
        self._events: dict[tuple, list[TapEvent]] = {}
        self._rows: dict[tuple, list[tuple[nn.Parameter, DenseRows]]] = {}
        self._elements = 0

    def wait(self, kind: tuple, event: TapEvent) -> None:
        """Take a layer's tensors; a rule in `STACKABLE` can't tell layers of the same kind (`kind_of`) apart."""
        self._events.setdefault(kind, []).append(event)
        for tensor in (*(event.inputs or ()), event.grad_outputs[0]):
            self._elements += 0 if tensor is None else tensor.numel()

    def take(self, parameter: nn.Parameter, rows: Rows) -> bool:
        """Take dense, small rows; return False for others."""
        if type(rows) is not DenseRows or rows.rows.numel() > _small(rows.device):
            return False
        kind = (rows.transposed, rows.shape, rows.rows.dtype, rows.device)
        self._rows.setdefault(kind, []).append((parameter, rows))
        return True

    @property
    def is_full(self) -> bool:
        """Whether it is time to `release`."""
        return self._elements > WAITING

    def release(self) -> list[Stack]:
        """Return the rows of all waiting layers, in stacks."""
        events, self._events, self._elements = self._events, {}, 0
        rows, self._rows = self._rows, {}
        stacks = [stack for (rule, *_), group in events.items() for stack in self._stacked(rule, group)]
        for group in rows.values():
            joined = torch.cat([part.rows for _, part in group], dim=1)
            stacks.append(Stack([p for p, _ in group], group[0][1].like(joined)))
        return stacks

    def _stacked(self, rule: Rule, events: list[TapEvent]) -> Iterator[Stack]:
        """Form the rows of L layers of the same kind: to the rule, they are one layer with L R objectives."""
        g = torch.cat([g for event in events if (g := event.first) is not None])
        x = torch.cat([event.inputs[0] for event in events if event.inputs])
        by_name = rule(events[0].tap.module, x, g, self._batch.segments.in_layers(len(events)))
        for name, rows in by_name.items():
            members = [event.targets[name] for event in events]
            dense = rows.compact(members[0].dtype, materialise=True)
            assert isinstance(dense, DenseRows)
            by_layer = dense.rows.unflatten(0, (len(events), -1))
            yield Stack(members, dense.like(by_layer.transpose(0, 1).flatten(1)))


def kind_of(rule: Rule, event: TapEvent) -> tuple | None:
    """Return what layers must have in common to be stacked; None if this layer is not small, or not `STACKABLE`."""
    if rule not in STACKABLE or event.inputs is None or len(event.inputs) != 1 or len(event.grad_outputs) != 1:
        return None
    x, g = event.inputs[0], event.grad_outputs[0]
    if g is None or x.numel() + g.numel() > _small(g.device):
        return None
    parameters = [(name, p.shape, p.dtype) for name, p in event.targets.items()]
    return (rule, x.shape, g.shape, x.dtype, g.dtype, g.device, *parameters)


def _small(device: torch.device) -> int:
    return SMALL_ON_CPU if device.type == "cpu" else SMALL

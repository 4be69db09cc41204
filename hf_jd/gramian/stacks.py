"""Rows of many small parameters of one shape, formed and multiplied together: one kernel for many layers.

Where layers are small, a step's time is spent in starting operations. So what small layers bring in a backward waits
(`Stacker`) until there is enough of it, and becomes the rows of all of them in one product (`Stack`).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from hf_jd.gramian.layouts import Batch
from hf_jd.gramian.rows import CHUNK, DenseRows, Rows, accumulation_dtype, combine, inner
from hf_jd.gramian.rules import Rule, linear, transposed_linear
from hf_jd.gramian.taps import TapEvent

ALIKE = {linear, transposed_linear}  # rules that read nothing of a layer but its parameters' shapes
SMALL, SMALL_ON_CPU = 1024 * 1024, 16 * 1024  # elements of a layer's tensors, or of its rows, up to which they wait
WAITING = 4 * 1024 * 1024  # elements that may wait: activations that a backward would have freed


class Stack:
    """The rows of L parameters of one shape, side by side.

    Args:
        members: The L parameters.
        rows: [R, L * numel]; its `shape`, and whether rows are transposed, are those of one parameter.
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
        """Bytes held."""
        return self.rows.nbytes

    def gramian(self) -> Tensor:
        """The sum of the members' Gramians: float64 [R, R]."""
        return self.rows.gramian()

    def gramians(self) -> Tensor:
        """Those of each member: float64 [L, R, R]."""
        parts = self._parts()
        if parts.shape[2] <= CHUNK:
            parts = parts.to(accumulation_dtype(parts))
            return torch.bmm(parts, parts.mT).double()
        return torch.stack([inner(part, part) for part in parts])

    def weighted_sums(self, weights: Tensor) -> Sequence[Tensor]:
        """sum_i w_i row_i of each member, for weights [R], or [L, R] with those of each member."""
        if weights.dim() == 1:
            total = combine(weights, self.rows.rows)
        else:
            total = torch.cat([combine(w, part) for w, part in zip(weights, self._parts(), strict=True)])
        shape = self.rows.shape
        if self.rows.transposed:
            return total.view(len(self), *shape[::-1]).transpose(1, 2).contiguous().unbind()
        return total.view(len(self), *shape).unbind()

    def apart(self, member: nn.Parameter) -> DenseRows:
        """The rows of one member."""
        size, place = self.rows.shape.numel(), self._places[member]
        return self.rows.like(self.rows.rows[:, place * size : (place + 1) * size])

    def map(self, function: Callable[[Rows], Rows]) -> "Stack":
        """The stack of other objectives' rows: `function` treats each row as a whole."""
        rows = function(self.rows)
        assert isinstance(rows, DenseRows)
        return Stack(self.members, rows)

    def matches(self, other: "Stack | Rows | None") -> bool:
        """Whether rows of the same parameters stand in the same order."""
        return (
            isinstance(other, Stack)
            and other.rows.transposed == self.rows.transposed
            and len(other) == len(self)
            and all(a is b for a, b in zip(self.members, other.members, strict=True))
        )

    def _parts(self) -> Tensor:
        """The rows of each member, [L, R, numel]."""
        return self.rows.rows.unflatten(1, (len(self), -1)).transpose(0, 1)


class Stacker:
    """Takes what small layers bring as it comes, and returns their rows in stacks.

    Args:
        batch: The instances of the step.
    """

    def __init__(self, batch: Batch):
        self._batch = batch
        self._events: dict[tuple, list[TapEvent]] = {}
        self._rows: dict[tuple, list[tuple[nn.Parameter, DenseRows]]] = {}
        self._elements = 0

    def wait(self, kind: tuple, event: TapEvent) -> None:
        """Takes what a layer brings; layers of one `kind_of` differ in nothing that a rule of `ALIKE` reads."""
        self._events.setdefault(kind, []).append(event)
        for tensor in (*(event.inputs or ()), event.grad_outputs[0]):
            self._elements += 0 if tensor is None else tensor.numel()

    def take(self, parameter: nn.Parameter, rows: Rows) -> bool:
        """Takes rows that are dense and small, or tells that they are not."""
        if type(rows) is not DenseRows or rows.rows.numel() > _small(rows.device):
            return False
        kind = (rows.transposed, rows.shape, rows.rows.dtype, rows.device)
        self._rows.setdefault(kind, []).append((parameter, rows))
        return True

    @property
    def is_full(self) -> bool:
        """Whether no more should wait."""
        return self._elements > WAITING

    def release(self) -> list[Stack]:
        """All that waits, in stacks."""
        events, self._events, self._elements = self._events, {}, 0
        rows, self._rows = self._rows, {}
        stacks = [stack for (rule, *_), group in events.items() for stack in self._stacked(rule, group)]
        for group in rows.values():
            joined = torch.cat([part.rows for _, part in group], dim=1)
            stacks.append(Stack([p for p, _ in group], group[0][1].like(joined)))
        return stacks

    def _stacked(self, rule: Rule, events: list[TapEvent]) -> Iterator[Stack]:
        """The rows of L layers alike: for its rule they are one layer, and L R objectives."""
        g = torch.cat([g for event in events if (g := event.first) is not None])
        x = torch.cat([event.inputs[0] for event in events if event.inputs])
        found = rule(events[0].tap.module, x, g, self._batch.segments.in_layers(len(events)))
        for name, rows in found.items():
            members = [event.targets[name] for event in events]
            dense = rows.compact(members[0].dtype, materialise=True)
            assert isinstance(dense, DenseRows)
            by_layer = dense.rows.unflatten(0, (len(events), -1))
            yield Stack(members, dense.like(by_layer.transpose(0, 1).flatten(1)))


def kind_of(rule: Rule, event: TapEvent) -> tuple | None:
    """What layers must have in common to be stacked; None where this one is no small layer of a rule of `ALIKE`."""
    if rule not in ALIKE or event.inputs is None or len(event.inputs) != 1 or len(event.grad_outputs) != 1:
        return None
    x, g = event.inputs[0], event.grad_outputs[0]
    if g is None or x.numel() + g.numel() > _small(g.device):
        return None
    parameters = [(name, p.shape, p.dtype) for name, p in event.targets.items()]
    return (rule, x.shape, g.shape, x.dtype, g.dtype, g.device, *parameters)


def _small(device: torch.device) -> int:
    return SMALL_ON_CPU if device.type == "cpu" else SMALL

"""Rows of many small parameters of one shape, formed and multiplied together: one kernel for many layers.

Where layers are small, a step's time is spent in starting operations. So what small layers bring in a backward waits
(`Stacker`) until there is enough of it, and becomes the rows of all of them in one product (`Stack`).
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from hf_jd.gramian.rows import DenseRows, OuterRows, Rows, combine, inner, narrow

SMALL, SMALL_ON_CPU = 1024 * 1024, 16 * 1024  # elements of a layer's rows, and of their factors, up to which they wait
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
        return torch.stack([inner(part, part) for part in self._parts()])

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

    def _parts(self) -> Sequence[Tensor]:
        return self.rows.rows.split(self.rows.shape.numel(), dim=1)


class Stacker:
    """Takes the rows of small layers as they come, and returns them in stacks."""

    def __init__(self) -> None:
        self._waiting: dict[tuple, list[tuple[nn.Parameter, DenseRows | OuterRows]]] = {}
        self._elements = 0

    def take(self, parameter: nn.Parameter, rows: Rows) -> bool:
        """Takes rows that are small enough, or tells that they are not."""
        if type(rows) is OuterRows:
            g, x = rows.grad_output, rows.input
            size = max(g.numel() + x.numel(), len(g) * rows.shape.numel())
            kind = (g.shape, x.shape, rows.shape, parameter.dtype, g.dtype, g.device)
        elif type(rows) is DenseRows:
            size = rows.rows.numel()
            kind = (rows.transposed, rows.shape, rows.rows.dtype, rows.device)
        else:
            return False
        if size > (SMALL_ON_CPU if rows.device.type == "cpu" else SMALL):
            return False
        self._waiting.setdefault(kind, []).append((parameter, rows))
        self._elements += size
        return True

    @property
    def is_full(self) -> bool:
        """Whether no more should wait."""
        return self._elements > WAITING

    def release(self) -> list[Stack]:
        """All that waits, in stacks."""
        waiting, self._waiting, self._elements = self._waiting, {}, 0
        return [_stacked([p for p, _ in part], [rows for _, rows in part]) for part in waiting.values()]


def _stacked(members: list[nn.Parameter], parts: Sequence[DenseRows | OuterRows]) -> Stack:
    first = parts[0]
    if isinstance(first, DenseRows):
        rows = torch.cat([part.rows for part in parts if isinstance(part, DenseRows)], dim=1)
        return Stack(members, first.like(rows))
    outer = [part for part in parts if isinstance(part, OuterRows)]
    g, x = torch.stack([part.grad_output for part in outer], 1), torch.stack([part.input for part in outer], 1)
    transposed = narrow(first.shape)
    left, right = (x, g) if transposed else (g, x)
    rows = torch.bmm(left.flatten(0, 1).transpose(1, 2), right.flatten(0, 1)).view(len(g), -1)
    return Stack(members, DenseRows(rows.to(members[0].dtype), first.shape, transposed))

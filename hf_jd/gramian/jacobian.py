"""The Jacobian of a model's objectives: the rows of all trainable parameters, and the products that a step needs."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_jd.gramian._rules.stacks import Stack
from hf_jd.gramian.blocks import places_of
from hf_jd.gramian.rows import DenseRows, Rows

ParameterRows = Rows | Stack | None


class Jacobian:
    """The rows of R objectives with respect to the trainable parameters of a model.

    Args:
        rows: The rows of each parameter, or the stack that holds them; `None` if no objective depends on it (rows of
            zeros).
        objectives: R.
        blocks: The name of each parameter's block; None: a single block.
    """

    def __init__(
        self,
        rows: Mapping[nn.Parameter, ParameterRows],
        objectives: int,
        blocks: Mapping[nn.Parameter, str] | None = None,
    ):
        self._rows = dict(rows)
        self._objectives = objectives
        self._blocks = blocks

    def __len__(self) -> int:
        """R, the number of objectives."""
        return self._objectives

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trainable parameters, in the model's order, including those that no objective depends on."""
        return list(self._rows)

    @property
    def used(self) -> list[nn.Parameter]:
        """The parameters that some objective depends on, in the model's order."""
        return [p for p, rows in self._rows.items() if rows is not None]

    @property
    def nbytes(self) -> int:
        """The memory of the rows, in bytes."""
        return sum(rows.nbytes for rows in [*self._stacks(), *self._single().values()])

    def gramian(self) -> Tensor:
        """Compute G = J J^T [R, R], symmetric, summed in float64; returned in float32, or float64 if a parameter is."""
        device = next((p.device for p, rows in self._rows.items() if rows is not None), torch.device("cpu"))
        total = torch.zeros(len(self), len(self), dtype=torch.float64, device=device)
        with torch.autocast(device.type, enabled=False):
            for rows in [*self._stacks(), *self._single().values()]:
                total += rows.gramian().to(device)
        return self._symmetric(total)

    @property
    def blocks(self) -> list[str]:
        """The names of the B blocks, in the model's order; without blocks, a single empty name."""
        return [""] if self._blocks is None else list(dict.fromkeys(self._blocks.values()))

    def gramians(self) -> Tensor:
        """Compute each block's Gramian, [B, R, R]; they sum to `gramian()`."""
        if self._blocks is None:
            return self.gramian()[None]
        places = places_of(self._blocks, self._rows)
        device = next((p.device for p, rows in self._rows.items() if rows is not None), torch.device("cpu"))
        total = torch.zeros(len(self.blocks), len(self), len(self), dtype=torch.float64, device=device)
        with torch.autocast(device.type, enabled=False):
            for stack in self._stacks():
                where = torch.tensor([places[p] for p in stack.members], device=device)
                total.index_add_(0, where, stack.gramians().to(device))
            for parameter, rows in self._single().items():
                total[places[parameter]] += rows.gramian().to(device)
        return self._symmetric(total)

    def weighted_sum(self, weights: Tensor) -> dict[nn.Parameter, Tensor]:
        """Compute J^T w, by parameter and in its dtype, without parameters that no objective depends on.

        Args:
            weights: [R]; or [B, R], one set per block, in the order of `blocks`.
        """
        sums: dict[nn.Parameter, Tensor] = {}
        if weights.dim() == 2 and self._blocks is None:
            weights = weights[0]
        places = places_of(self._blocks, self._rows) if weights.dim() == 2 else {}
        for stack in self._stacks():
            device = stack.rows.device
            w = weights[[places[p] for p in stack.members]] if places else weights
            with torch.autocast(device.type, enabled=False):
                sums.update(zip(stack.members, stack.weighted_sums(w.to(device)), strict=True))
        for parameter, rows in self._single().items():
            w = weights[places[parameter]] if places else weights
            with torch.autocast(parameter.device.type, enabled=False):
                sums[parameter] = rows.weighted_sum(w.to(parameter.device))
        return {p: sums[p].to(p.dtype) for p, rows in self._rows.items() if rows is not None}

    def dense(self) -> Tensor:
        """Return J [R, n], parameters flattened in order, with zeros for those that no objective depends on."""
        return torch.cat([self.rows(p) for p in self._rows], dim=1)

    def rows(self, parameter: nn.Parameter) -> Tensor:
        """Return the rows of one parameter [R, parameter.numel()]."""
        rows = self._apart(parameter)
        if rows is not None:
            return rows.dense()
        return torch.zeros(len(self), parameter.numel(), dtype=parameter.dtype, device=parameter.device)

    def columns(self, parameter: nn.Parameter, start: int, stop: int) -> Tensor:
        """Return some columns of the rows of a used parameter: [R, stop - start]."""
        rows = self._apart(parameter)
        assert rows is not None
        return rows.columns(start, stop)

    def select(self, index: Tensor) -> "Jacobian":
        """Return the rows of some objectives, by indices [R']; other rows are dropped, not multiplied by 0."""
        return self._map(lambda rows: rows.select(index.to(rows.device)), len(index))

    def scaled(self, factors: Tensor) -> "Jacobian":
        """Return each row times its factor; factors [R]."""
        return self._map(lambda rows: rows.scaled(factors.to(rows.device)), len(self))

    def combined(self, matrix: Tensor) -> "Jacobian":
        """Return the rows A J of K objectives that are weighted sums of these; A [K, R]."""
        with torch.autocast(matrix.device.type, enabled=False):
            return self._map(lambda rows: rows.combined(matrix.to(rows.device)), len(matrix))

    def __add__(self, other: "Jacobian") -> "Jacobian":
        """Add the rows of the same objectives over another batch."""
        return self._merge(other, lambda a, b: a + b, len(self))

    @staticmethod
    def cat(parts: Sequence["Jacobian"]) -> "Jacobian":
        """Stack the rows of several batches' objectives."""
        total = parts[0]
        for part in parts[1:]:
            total = total._merge(part, lambda a, b: a.below(b), len(total) + len(part))
        return total

    def _map(self, function: Callable[[Rows], Rows], objectives: int) -> "Jacobian":
        mapped: dict[nn.Parameter, ParameterRows] = dict.fromkeys(self._rows)
        for stack in self._stacks():
            mapped.update(dict.fromkeys(stack.members, stack.map(function)))
        mapped.update({p: function(rows) for p, rows in self._single().items()})
        return Jacobian(mapped, objectives, self._blocks)

    def _merge(self, other: "Jacobian", function: Callable[[Rows, Rows], Rows], objectives: int) -> "Jacobian":
        """Join the rows of each parameter; when objectives are stacked, fill missing rows with zeros."""
        merged: dict[nn.Parameter, ParameterRows] = dict.fromkeys(self._rows)
        for stack in self._stacks():
            theirs = other._rows[stack.members[0]]
            if isinstance(theirs, Stack) and stack.matches(theirs):
                joined = stack.map(lambda rows, theirs=theirs: function(rows, theirs.rows))
                merged.update(dict.fromkeys(stack.members, joined))
        for p in (p for p, rows in merged.items() if rows is None):
            ours, theirs = self._apart(p), other._apart(p)
            if ours is not None and theirs is not None:
                merged[p] = function(ours, theirs)
            elif ours is not None or theirs is not None:
                merged[p] = ours if theirs is None else theirs
                if objectives > len(self):
                    merged[p] = DenseRows(torch.cat([self.rows(p), other.rows(p)]), p.shape)
        return Jacobian(merged, objectives, other._blocks if self._blocks is None else self._blocks)

    def _symmetric(self, total: Tensor) -> Tensor:
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in self._rows) else torch.float32
        return ((total + total.mT) / 2).to(dtype)

    def _stacks(self) -> list[Stack]:
        return list({id(rows): rows for rows in self._rows.values() if type(rows) is Stack}.values())

    def _single(self) -> dict[nn.Parameter, Rows]:
        return {p: rows for p, rows in self._rows.items() if rows is not None and not isinstance(rows, Stack)}

    def _apart(self, parameter: nn.Parameter) -> Rows | None:
        rows = self._rows[parameter]
        return rows.apart(parameter) if isinstance(rows, Stack) else rows

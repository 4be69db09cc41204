"""The Jacobian of a model's objectives: the rows of all its trainable parameters, and what a step needs of them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_jd.gramian.rows import DenseRows, Rows, combine, inner

BUCKET = 4 * 1024 * 1024  # elements of one bucket of small rows: few large kernels instead of one a parameter
SMALL, SMALL_ON_CPU = 1024 * 1024, 16 * 1024  # elements of rows that go into buckets


class Jacobian:
    """The rows of R objectives with regard to the trainable parameters of a model.

    Args:
        rows: The rows of each parameter; `None` where no objective depends on it (a row of zeros).
        objectives: R.
    """

    def __init__(self, rows: Mapping[nn.Parameter, Rows | None], objectives: int):
        self._rows = dict(rows)
        self._objectives = objectives
        self._buckets: list[tuple[list[nn.Parameter], Tensor]] | None = None

    def __len__(self) -> int:
        """R, the number of objectives."""
        return self._objectives

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trainable parameters, in the model's order, with those that no objective depends on."""
        return list(self._rows)

    @property
    def used(self) -> list[nn.Parameter]:
        """The parameters that some objective depends on, in the model's order."""
        return [p for p, rows in self._rows.items() if rows is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the rows take."""
        return sum(rows.nbytes for rows in self._rows.values() if rows is not None)

    def gramian(self) -> Tensor:
        """G = J J^T [R, R], symmetric; float32, or float64 where a parameter is; inner products summed in float64."""
        used = self.used
        device = used[0].device if used else torch.device("cpu")
        total = torch.zeros(len(self), len(self), dtype=torch.float64, device=device)
        with torch.autocast(device.type, enabled=False):
            for _, bucket in self._packed():
                total += inner(bucket, bucket).to(device)
            for rows in self._unpacked().values():
                total += rows.gramian().to(device)
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in self._rows) else torch.float32
        return ((total + total.T) / 2).to(dtype)

    def weighted_sum(self, weights: Tensor) -> dict[nn.Parameter, Tensor]:
        """J^T w for weights [R], by parameter and in its dtype; without those that no objective depends on."""
        sums = {}
        for parameters, bucket in self._packed():
            with torch.autocast(bucket.device.type, enabled=False):
                total = combine(weights.to(bucket.device), bucket)
            parts = total.split([p.numel() for p in parameters])
            sums.update({p: self._dense(p).shaped(part) for p, part in zip(parameters, parts, strict=True)})
        for parameter, rows in self._unpacked().items():
            with torch.autocast(parameter.device.type, enabled=False):
                sums[parameter] = rows.weighted_sum(weights.to(parameter.device))
        return {p: sums[p].to(p.dtype) for p in self._rows if p in sums}

    def dense(self) -> Tensor:
        """J [R, n], parameters flattened in order, zeros for those that no objective depends on."""
        return torch.cat([self.rows(p) for p in self._rows], dim=1)

    def rows(self, parameter: nn.Parameter) -> Tensor:
        """The rows of one parameter [R, parameter.numel()]."""
        rows = self._rows[parameter]
        if rows is not None:
            return rows.dense()
        return torch.zeros(len(self), parameter.numel(), dtype=parameter.dtype, device=parameter.device)

    def columns(self, parameter: nn.Parameter, start: int, stop: int) -> Tensor:
        """Some columns of the rows of one parameter that is used: [R, stop - start]."""
        rows = self._rows[parameter]
        assert rows is not None
        return rows.columns(start, stop)

    def select(self, index: Tensor) -> "Jacobian":
        """The rows of some objectives, by indices [R']; the others are dropped, not multiplied by 0."""
        return self._map(lambda rows: rows.select(index.to(rows.device)), len(index))

    def scaled(self, factors: Tensor) -> "Jacobian":
        """Each row multiplied by its factor; factors [R]."""
        return self._map(lambda rows: rows.scaled(factors.to(rows.device)), len(self))

    def combined(self, matrix: Tensor) -> "Jacobian":
        """The rows A J of K objectives that are weighted sums of these; A [K, R]."""
        with torch.autocast(matrix.device.type, enabled=False):
            return self._map(lambda rows: rows.combined(matrix.to(rows.device)), len(matrix))

    def __add__(self, other: "Jacobian") -> "Jacobian":
        """The same objectives over two batches: their contributions add."""
        return self._merge(other, lambda a, b: a + b, len(self), pad=False)

    @staticmethod
    def cat(parts: Sequence["Jacobian"]) -> "Jacobian":
        """The objectives of several batches, one below the other."""
        total = parts[0]
        for part in parts[1:]:
            total = total._merge(part, lambda a, b: a.below(b), len(total) + len(part), pad=True)
        return total

    def _map(self, function: Callable[[Rows], Rows], objectives: int) -> "Jacobian":
        return Jacobian({p: None if rows is None else function(rows) for p, rows in self._rows.items()}, objectives)

    def _merge(
        self, other: "Jacobian", function: Callable[[Rows, Rows], Rows], objectives: int, pad: bool
    ) -> "Jacobian":
        merged: dict[nn.Parameter, Rows | None] = {}
        for p, rows in self._rows.items():
            theirs = other._rows[p]
            if rows is None or theirs is None:
                merged[p] = theirs if rows is None else rows
                if pad and merged[p] is not None:
                    merged[p] = DenseRows(torch.cat([self.rows(p), other.rows(p)]), p.shape)
            else:
                merged[p] = function(rows, theirs)
        return Jacobian(merged, objectives)

    def _unpacked(self) -> dict[nn.Parameter, Rows]:
        packed = {p for parameters, _ in self._packed() for p in parameters}
        return {p: rows for p, rows in self._rows.items() if rows is not None and p not in packed}

    def _packed(self) -> list[tuple[list[nn.Parameter], Tensor]]:
        """Small dense rows side by side in buckets; the parameters' rows become views of them."""
        if self._buckets is None:
            small = {p: r for p, r in self._rows.items() if isinstance(r, DenseRows) and r.rows.numel() <= _worth(r)}
            kinds: dict[tuple, list[nn.Parameter]] = {}
            for p, rows in small.items():
                kinds.setdefault((rows.device, rows.rows.dtype), []).append(p)
            self._buckets = [self._pack(part) for kind in kinds.values() for part in _split(kind, BUCKET // len(self))]
        return self._buckets

    def _pack(self, parameters: list[nn.Parameter]) -> tuple[list[nn.Parameter], Tensor]:
        bucket = torch.cat([self._dense(p).rows for p in parameters], dim=1)
        for p, view in zip(parameters, bucket.split([p.numel() for p in parameters], dim=1), strict=True):
            self._rows[p] = self._dense(p).like(view)
        return parameters, bucket

    def _dense(self, parameter: nn.Parameter) -> DenseRows:
        rows = self._rows[parameter]
        assert isinstance(rows, DenseRows)
        return rows


def _worth(rows: Rows) -> int:
    """Elements up to which copying rows side by side costs less than kernels of their own."""
    return SMALL_ON_CPU if rows.device.type == "cpu" else SMALL


def _split(parameters: Sequence[nn.Parameter], columns: int) -> list[list[nn.Parameter]]:
    """Consecutive parameters in parts of at most `columns` columns, or of one parameter."""
    parts: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if not parts or parameter.numel() > room:
            parts.append([])
            room = columns
        parts[-1].append(parameter)
        room -= parameter.numel()
    return parts

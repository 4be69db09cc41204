"""The representations of rows: ways to store the gradients of R objectives with respect to one parameter.

Each class implements the products that Jacobian descent needs. A new representation is added here and nowhere else;
`jacobian.py` combines the parameters of a model.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

CHUNK = 65_536  # columns per inner product: longer float32 sums lose digits (1.7e-3 relative at 10M columns)
BLOCK = 64  # objectives up to which a symmetric product is fastest in one piece
COLUMNS = 64  # columns up to which forming a tall product transposed is several times faster


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Compute a b^T of rows [R, n] and [S, n]: [R, S] float64, in chunks of `CHUNK` columns summed in float64.

    Multiply half-precision rows in float32. If b is a, only half of the blocks are computed.
    """
    if a is b and len(a) > BLOCK:
        upper, lower = a.split([len(a) // 2, len(a) - len(a) // 2])
        corner = inner(upper, lower)
        return torch.cat([torch.cat([inner(upper, upper), corner], 1), torch.cat([corner.T, inner(lower, lower)], 1)])
    if a.shape[1] <= CHUNK:
        return (a.to(accumulation_dtype(a)) @ b.to(accumulation_dtype(b)).T).double()
    total = a.new_zeros(len(a), len(b), dtype=torch.float64)
    for a_c, b_c in zip(a.split(CHUNK, dim=1), b.split(CHUNK, dim=1), strict=True):
        total += a_c.to(accumulation_dtype(a)) @ b_c.to(accumulation_dtype(b)).T
    return total


def narrow(shape: torch.Size) -> bool:
    """Return whether forming a product of this shape [p, d] as [d, p] is faster, as for LoRA's B."""
    return shape[-1] <= COLUMNS and shape[-1] < shape[0]


def combine(weights: Tensor, rows: Tensor) -> Tensor:
    """Compute w^T rows for weights [R] or [K, R] and rows [R, n], in the rows' dtype; half precision via float32."""
    if accumulation_dtype(rows) == rows.dtype:
        return weights.to(rows.dtype) @ rows
    parts = [weights.float() @ part.float() for part in rows.split(CHUNK, dim=1)]
    return torch.cat([part.to(rows.dtype) for part in parts], dim=-1)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which products of `tensor` are computed: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


class Rows(ABC):
    """The rows of one parameter: a matrix [R, parameter.numel()] in some representation."""

    objectives: int
    shape: torch.Size
    device: torch.device

    def dense(self) -> Tensor:
        """Return the rows as one tensor [R, numel]."""
        return self.block(0, self.shape[0])

    @abstractmethod
    def block(self, first: int, last: int) -> Tensor:
        """Return the columns of `parameter[first:last]`: [R, (last - first) * numel / len(parameter)]."""

    def columns(self, start: int, stop: int) -> Tensor:
        """Return columns of `dense()`, without forming many others: [R, stop - start]."""
        width = math.prod(self.shape[1:])
        first = start // width
        return self.block(first, -(-stop // width))[:, start - first * width : stop - first * width]

    @abstractmethod
    def gramian(self) -> Tensor:
        """Compute the Gramian of these rows, float64 [R, R]."""

    @abstractmethod
    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Compute sum_i w_i row_i for weights [R], shaped like the parameter, in the rows' dtype."""

    def combined(self, matrix: Tensor) -> "Rows":
        """Return the rows of K objectives that are weighted sums of these; matrix [K, R]."""
        return DenseRows(torch.stack([self.weighted_sum(weights).flatten() for weights in matrix]), self.shape)

    @abstractmethod
    def select(self, index: Tensor) -> "Rows":
        """Return the rows of some objectives, by index; rows are picked, not multiplied by 0 (0 * NaN is NaN)."""

    @abstractmethod
    def scaled(self, factors: Tensor) -> "Rows":
        """Return each row times its factor; factors [R]."""

    @abstractmethod
    def __add__(self, other: "Rows") -> "Rows":
        """Add the rows of another use of the parameter by the same objectives."""

    @abstractmethod
    def below(self, other: "Rows") -> "Rows":
        """Append the rows of other objectives."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The memory of the rows, in bytes."""

    def compact(self, dtype: torch.dtype, materialise: bool) -> "Rows":
        """Return the representation to store. For factors, this is the only place where memory decides.

        Args:
            dtype: The parameter's, for dense rows.
            materialise: Whether to form rows even if factors are smaller.
        """
        return self

    def fits(self, parameter: Tensor, objectives: int) -> bool:
        """Return whether these are `objectives` rows of the parameter."""
        return self.shape == parameter.shape and self.objectives == objectives


class DenseRows(Rows):
    """Materialised rows [R, numel].

    Args:
        rows: [R, numel].
        shape: Of the parameter.
        transposed: Whether a row holds the parameter [p, d] column by column. The order is the same for all rows, so
            their products don't depend on it.
    """

    def __init__(self, rows: Tensor, shape: torch.Size, transposed: bool = False):
        self.rows, self.shape, self.objectives, self.device = rows, shape, len(rows), rows.device
        self.transposed = transposed

    def dense(self) -> Tensor:
        return super().dense() if self.transposed else self.rows

    def block(self, first: int, last: int) -> Tensor:
        if self.transposed:
            return self.rows.unflatten(1, self.shape[::-1])[:, :, first:last].transpose(1, 2).flatten(1)
        width = math.prod(self.shape[1:])
        return self.rows[:, first * width : last * width]

    def columns(self, start: int, stop: int) -> Tensor:
        return super().columns(start, stop) if self.transposed else self.rows[:, start:stop]

    def gramian(self) -> Tensor:
        return inner(self.rows, self.rows)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.shaped(combine(weights, self.rows))

    def shaped(self, vector: Tensor) -> Tensor:
        """Reshape a sum of rows [numel] like the parameter."""
        return vector.view(self.shape[::-1]).T.contiguous() if self.transposed else vector.view(self.shape)

    def like(self, rows: Tensor) -> "DenseRows":
        """Wrap other rows in the same order."""
        return DenseRows(rows, self.shape, self.transposed)

    def select(self, index: Tensor) -> Rows:
        return self.like(self.rows[index])

    def combined(self, matrix: Tensor) -> Rows:
        return self.like(combine(matrix, self.rows))

    def scaled(self, factors: Tensor) -> Rows:
        return self.like(self.rows * factors.to(self.rows.dtype)[:, None])

    def __add__(self, other: Rows) -> Rows:
        if isinstance(other, DenseRows) and other.transposed == self.transposed:
            return self.like(self.rows + other.rows)
        return DenseRows(self.dense() + other.dense(), self.shape)

    def below(self, other: Rows) -> Rows:
        if isinstance(other, DenseRows) and other.transposed == self.transposed:
            return self.like(torch.cat([self.rows, other.rows]))
        return DenseRows(torch.cat([self.dense(), other.dense()]), self.shape)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def fits(self, parameter: Tensor, objectives: int) -> bool:
        return super().fits(parameter, objectives) and self.rows.shape[1] == parameter.numel()


class SparseRows(Rows):
    """Rows of an embedding table [V, d]: entry e of `values` [E, d] is row `ids[e]` of the table for `owners[e]`.

    Never stores [R, V, d]. Entries are coalesced: each pair (owner, id) occurs once.
    """

    def __init__(self, owners: Tensor, ids: Tensor, values: Tensor, objectives: int, shape: torch.Size):
        self.objectives, self.shape, self.device = objectives, shape, values.device
        keys, slots = torch.unique(owners * shape[0] + ids, return_inverse=True)
        self.owners, self.ids = keys // shape[0], keys % shape[0]
        self.values = values.new_zeros(len(keys), values.shape[1]).index_add_(0, slots, values)

    def block(self, first: int, last: int) -> Tensor:
        inside = ((self.ids >= first) & (self.ids < last)).nonzero().flatten()
        rows = self.values.new_zeros(self.objectives, last - first, self.shape[1])
        rows[self.owners[inside], self.ids[inside] - first] = self.values[inside]
        return rows.flatten(1)

    def gramian(self) -> Tensor:
        """Run over the ids that occur, in chunks, so that at most [R, CHUNK] is dense at a time."""
        used, slots = torch.unique(self.ids, return_inverse=True)
        order = torch.argsort(slots, stable=True)
        step = max(1, CHUNK // self.shape[1])
        edges = torch.searchsorted(slots[order], torch.arange(0, len(used) + step, step, device=slots.device)).tolist()
        total = self.values.new_zeros(self.objectives, self.objectives, dtype=torch.float64)
        for chunk, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
            entries = order[start:stop]
            block = self.values.new_zeros(self.objectives, step, self.shape[1])
            block[self.owners[entries], slots[entries] - chunk * step] = self.values[entries]
            flat = block.flatten(1)
            total += inner(flat, flat)
        return total

    def cross(self, other: "OuterRows") -> Tensor:
        """Compute <these rows, outer rows> [R, R] without V x d: C_ij = sum_{e of i, s} (v_e . x_js) g_js[id_e]."""
        owners = torch.nn.functional.one_hot(self.owners, self.objectives).to(accumulation_dtype(self.values))
        columns = []
        for g, x in zip(other.grad_output, other.input, strict=True):
            products = (self.values @ x.T.to(self.values.dtype)) * g.T[self.ids]
            columns.append(owners.T @ products.sum(1).to(owners.dtype))
        return torch.stack(columns, dim=1).double()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scaled = self.values * weights.to(self.values.dtype)[self.owners, None]
        return self.values.new_zeros(self.shape).index_add_(0, self.ids, scaled)

    def select(self, index: Tensor) -> Rows:
        position = torch.full((self.objectives,), -1, device=index.device).scatter_(
            0, index, torch.arange(len(index), device=index.device)
        )
        owners = position[self.owners]
        selected = owners >= 0
        return SparseRows(owners[selected], self.ids[selected], self.values[selected], len(index), self.shape)

    def scaled(self, factors: Tensor) -> Rows:
        values = self.values * factors.to(self.values.dtype)[self.owners, None]
        return SparseRows(self.owners, self.ids, values, self.objectives, self.shape)

    def __add__(self, other: Rows) -> Rows:
        if isinstance(other, SparseRows):
            return self._joined(other, other.owners, self.objectives)
        if isinstance(other, OuterRows | SumRows):
            return other + self
        rows = other.dense().unflatten(1, self.shape).clone()
        rows[self.owners, self.ids] += self.values
        return DenseRows(rows.flatten(1), self.shape)

    def below(self, other: Rows) -> Rows:
        if isinstance(other, SparseRows):
            return self._joined(other, other.owners + self.objectives, self.objectives + other.objectives)
        return DenseRows(torch.cat([self.dense(), other.dense()]), self.shape)

    def _joined(self, other: "SparseRows", owners: Tensor, objectives: int) -> "SparseRows":
        return SparseRows(
            torch.cat([self.owners, owners]),
            torch.cat([self.ids, other.ids]),
            torch.cat([self.values, other.values]),
            objectives,
            self.shape,
        )

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.owners.nbytes + self.ids.nbytes


class OuterRows(Rows):
    """Rows as factors: row i = sum_s g_is x_is^T for grad_output [R, S, p] and input [R, S, d].

    A linear layer stores these factors anyway; they are smaller than rows if S (p + d) < p d.
    """

    def __init__(self, grad_output: Tensor, input: Tensor, shape: torch.Size):
        self.grad_output, self.input = grad_output, input
        self.shape, self.objectives, self.device = shape, len(input), input.device

    def block(self, first: int, last: int) -> Tensor:
        return torch.bmm(self.grad_output[..., first:last].transpose(1, 2), self.input).flatten(1)

    def gramian(self) -> Tensor:
        """Use the cheaper of the ghost form sum((x_i x_j^T) * (g_i g_j^T)) and rows formed in chunks.

        Compare R^2 S^2 (p + d) with 2 R S p d + R^2 p d multiplications, the costs of a Gramian (not of norms alone).
        """
        (r, s, p), d = self.grad_output.shape, self.input.shape[-1]
        if r * s * (p + d) <= (2 + r / s) * p * d:
            return self._ghost()
        step = max(1, CHUNK // d)
        total = self.input.new_zeros(r, r, dtype=torch.float64)
        for g in self.grad_output.split(step, dim=2):
            block = torch.bmm(g.transpose(1, 2), self.input).flatten(1)
            total += inner(block, block)
        return total

    def _ghost(self) -> Tensor:
        r, s, _ = self.grad_output.shape
        dtype = accumulation_dtype(self.input)
        x, g = self.input.flatten(0, 1).to(dtype), self.grad_output.flatten(0, 1).to(dtype)
        total = []
        for x_i, g_i in zip(x.split(s), g.split(s), strict=True):
            products = (x_i @ x.T) * (g_i @ g.T)
            total.append(products.sum(0, dtype=torch.float64).view(r, s).sum(1))
        return torch.stack(total)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        weights = weights.to(self.grad_output.dtype)[:, None, None]
        if narrow(self.shape):
            return ((self.input * weights).flatten(0, 1).T @ self.grad_output.flatten(0, 1)).T.contiguous()
        return ((self.grad_output * weights).flatten(0, 1).T @ self.input.flatten(0, 1)).view(self.shape)

    def select(self, index: Tensor) -> Rows:
        return OuterRows(self.grad_output[index], self.input[index], self.shape)

    def scaled(self, factors: Tensor) -> Rows:
        return OuterRows(self.grad_output * factors.to(self.grad_output.dtype)[:, None, None], self.input, self.shape)

    def __add__(self, other: Rows) -> Rows:
        if isinstance(other, OuterRows):
            g = torch.cat([self.grad_output, other.grad_output], dim=1)
            return OuterRows(g, torch.cat([self.input, other.input], dim=1), self.shape)
        return SumRows([self, other]) if isinstance(other, SparseRows) else other + self

    def below(self, other: Rows) -> Rows:
        if isinstance(other, OuterRows) and other.input.shape[1] == self.input.shape[1]:
            g = torch.cat([self.grad_output, other.grad_output])
            return OuterRows(g, torch.cat([self.input, other.input]), self.shape)
        return DenseRows(torch.cat([self.dense(), other.dense()]), self.shape)

    def compact(self, dtype: torch.dtype, materialise: bool) -> Rows:
        """Return the factors themselves, or dense rows in the parameter's dtype."""
        if self.stay_factors(materialise):
            return self
        if narrow(self.shape):
            rows = torch.bmm(self.input.transpose(1, 2), self.grad_output)
            return DenseRows(rows.flatten(1).to(dtype), self.shape, transposed=True)
        return DenseRows(self.dense().to(dtype), self.shape)

    def stay_factors(self, materialise: bool) -> bool:
        """Return whether to store factors.

        Yes if they are smaller than rows and rows need not be formed, or if the ghost form also makes them cheaper to
        multiply: R S (p + d) < 2 p d.
        """
        (r, s, p), d = self.grad_output.shape, self.input.shape[-1]
        return r * s * (p + d) < 2 * p * d or (not materialise and s * (p + d) < p * d)

    @property
    def nbytes(self) -> int:
        return self.grad_output.nbytes + self.input.nbytes


class SumRows(Rows):
    """A table used as embedding and as head: sparse rows plus outer rows, stored separately, with exact cross terms."""

    def __init__(self, parts: list[Rows]):
        outer = [part for part in parts if isinstance(part, OuterRows)]
        sparse = [part for part in parts if isinstance(part, SparseRows)]
        self.outer: Any = sum(outer[1:], start=outer[0])
        self.sparse: Any = sum(sparse[1:], start=sparse[0])
        self.shape, self.objectives, self.device = self.outer.shape, self.outer.objectives, self.outer.device

    def block(self, first: int, last: int) -> Tensor:
        return self.sparse.block(first, last) + self.outer.block(first, last)

    def gramian(self) -> Tensor:
        cross = self.sparse.cross(self.outer)
        return self.sparse.gramian() + self.outer.gramian() + cross + cross.T

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.sparse.weighted_sum(weights) + self.outer.weighted_sum(weights)

    def select(self, index: Tensor) -> Rows:
        return SumRows([self.outer.select(index), self.sparse.select(index)])

    def scaled(self, factors: Tensor) -> Rows:
        return SumRows([self.outer.scaled(factors), self.sparse.scaled(factors)])

    def __add__(self, other: Rows) -> Rows:
        if isinstance(other, DenseRows):
            return other + self
        parts = [other.outer, other.sparse] if isinstance(other, SumRows) else [other]
        return SumRows([self.outer, self.sparse, *parts])

    def below(self, other: Rows) -> Rows:
        return DenseRows(torch.cat([self.dense(), other.dense()]), self.shape)

    @property
    def nbytes(self) -> int:
        return self.outer.nbytes + self.sparse.nbytes

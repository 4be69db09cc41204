"""The rows of many processes -> one Gramian, and one update that is the same everywhere.

Every process makes the same collective calls in the same order, whatever its batch holds. Forward and backward passes
run under `no_sync`, so DDP's reducer never acts, and what is exchanged is exchanged here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

from hf_jd.gramian import Jacobian

# Longer inner products lose digits in float32, so they are summed in pieces.
_PIECE = 65_536


def process_count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gather_uneven(rows: Tensor) -> tuple[Tensor, slice]:
    """Concatenates [m_r, ...] of all processes r, in their order.

    Returns:
        [M, ...], and where the rows of this process are in it.
    """
    if process_count() == 1:
        return rows, slice(0, len(rows))
    own = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.empty_like(own) for _ in range(process_count())]
    distributed.all_gather(sizes, own)
    lengths = [int(size) for size in sizes]
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(parts, padded)
    start = sum(lengths[: distributed.get_rank()])
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]), slice(start, start + len(rows))


def add_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if process_count() > 1:
        distributed.all_reduce(tensor)
    return tensor


def used_anywhere(used: Iterable[nn.Parameter], parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that some process used: the others keep no gradient, as autograd would leave them."""
    if process_count() == 1:
        return list(used)
    used = set(used)
    flags = torch.tensor([float(p in used) for p in parameters], device=parameters[0].device)
    return [p for p, flag in zip(parameters, add_over_processes(flags).tolist(), strict=True) if flag]


def add_gradients(gradients: dict[nn.Parameter, Tensor], parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """The sum of gradients over all processes.

    Args:
        gradients: Those of this process.
        parameters: All trainable parameters, in the same order everywhere.
    """
    if process_count() == 1:
        return gradients
    used = used_anywhere(gradients, parameters)
    flat = torch.cat([gradients[p].flatten() if p in gradients else p.new_zeros(p.numel()) for p in parameters])
    total = split(add_over_processes(flat), parameters)
    return {p: total[p] for p in used}


def split(flat: Tensor, parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Cuts a vector [n] into tensors of the parameters' shapes."""
    pieces = flat.split([p.numel() for p in parameters])
    return {p: piece.view_as(p).to(p.dtype) for p, piece in zip(parameters, pieces, strict=True)}


def gramian_of(rows: Tensor) -> Tensor:
    """The Gramian [M, M] of dense rows [M, n]: float64 sums of pieces multiplied in float32, or in float64 for such."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for piece in rows.split(_PIECE, dim=1):
        piece = piece.to(torch.promote_types(piece.dtype, torch.float32))
        total += piece @ piece.T
    return total


class OwnRows:
    """Rows that this process weighs by itself; only the updates are added up.

    Args:
        jacobian: The rows [m_r, n] of this process, None where it has none.
        parameters: All trainable parameters, in the same order everywhere.
    """

    def __init__(self, jacobian: Jacobian | None, parameters: list[nn.Parameter]):
        self.jacobian = jacobian
        self.parameters = parameters
        self.mine = slice(None)

    def table(self, table: Tensor) -> Tensor:
        """What is known of the objectives [m_r, c] -> [M, c], of all that are weighed together."""
        return table

    def gramian(self) -> Tensor:
        """[M, M], the same on all processes that weigh together."""
        if self.jacobian is None:
            return torch.zeros(0, 0, dtype=torch.float64, device=self.parameters[0].device)
        return self.jacobian.gramian()

    def weighted_sum(self, weights: Tensor, usable: Tensor) -> dict[nn.Parameter, Tensor]:
        """The update sum_k w_k row_k over the usable objectives of all processes.

        Args:
            weights: [M].
            usable: [M] (bool); other rows may be NaN, and are not touched.
        """
        weights, usable = weights[self.mine], usable[self.mine]
        gradients = {}
        if self.jacobian is not None and usable.any():
            everything = bool(usable.all())
            jacobian = self.jacobian if everything else self.jacobian.select(usable.nonzero().flatten())
            gradients = jacobian.weighted_sum(weights if everything else weights[usable])
        return add_gradients(gradients, self.parameters)


class GatheredRows(OwnRows):
    """Objectives of which each process has its own, weighed all together: every process meets all M rows once."""

    def table(self, table: Tensor) -> Tensor:
        """[M, c]: the processes' objectives, one below the other."""
        table, self.mine = gather_uneven(table)
        return table

    def gramian(self) -> Tensor:
        """[M, M], of the rows of all processes."""
        if process_count() == 1:
            return super().gramian()
        return gramian_of(gather_uneven(self._dense())[0])

    def _dense(self) -> Tensor:
        dtype, device = torch.float32, self.parameters[0].device
        for p in self.parameters:
            dtype = torch.promote_types(dtype, p.dtype)
        if self.jacobian is None:
            return torch.zeros(0, sum(p.numel() for p in self.parameters), dtype=dtype, device=device)
        return self.jacobian.dense().to(dtype)


class AddedRows(GatheredRows):
    """Objectives that all processes share: their rows [K, n] are added up."""

    def table(self, table: Tensor) -> Tensor:
        """[K, 4]: losses, sums and counts added up; the groups are the same everywhere."""
        return torch.cat([add_over_processes(table[:, :-1].contiguous()), table[:, -1:]], dim=1)

    def gramian(self) -> Tensor:
        """[K, K], of the rows' sums."""
        if process_count() == 1:
            return super().gramian()
        self._rows = add_over_processes(self._dense())
        return gramian_of(self._rows)

    def weighted_sum(self, weights: Tensor, usable: Tensor) -> dict[nn.Parameter, Tensor]:
        """The update sum_k w_k row_k, of which every process has all rows; see `OwnRows.weighted_sum`."""
        if process_count() == 1:
            return super().weighted_sum(weights, usable)
        used = used_anywhere(self.jacobian.parameters if self.jacobian is not None else [], self.parameters)
        update = split(weights[usable].to(self._rows.dtype) @ self._rows[usable], self.parameters)
        return {p: update[p] for p in used}

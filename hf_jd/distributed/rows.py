"""The rows of all processes -> one Gramian per block of parameters, and one update.

The bytes that each of W processes sends per update, for n trainable elements of b bytes, with f = (W - 1) / W, the
share of a tensor that leaves a process (2 f in an all-reduce, which is a reduce-scatter and an all-gather):

| objectives | rows | Gramian | update | update of sharded parameters |
|---|---|---|---|---|
| instances, m_r on this process, M together | f b m_r n | 2 f 8 B M^2 | 2 f b n | f b n |
| K groups | f b K n | 2 f 8 B K^2 | f b n | 0 |

Each of the B blocks of parameters has its own Gramian; B is 1 by default. Plain data parallelism sends 2 f b n for its
gradient, or f b n with shards. A step also gathers 40 bytes per objective and 8 bytes per parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from hf_jd._compat import all_gather_single, reduce_scatter_single
from hf_jd.distributed.columns import Bucket, Piece, buckets, by_block, offsets
from hf_jd.distributed.gradients import Gradients, Transfer, add_gradients, flagged, in_turn, used_flags
from hf_jd.distributed.processes import add_over_processes, gather, gather_uneven, process_count, rank
from hf_jd.gramian import Jacobian
from hf_jd.gramian.blocks import places_of
from hf_jd.gramian.rows import combine, inner
from hf_jd.objectives import ObjectiveTable

SUMMED_HERE = ("cpu",)
"""Devices where an all-to-all and a sum replace reduce-scatter: gloo's takes longer than its all-reduce."""


class LocalRows:
    """Rows that this process weighs alone; only the updates are added up.

    Args:
        jacobian: The rows [m_r, n] of this process; None if it has none.
        parameters: All trainable parameters, in the same order everywhere.
        blocks: The name of each parameter's block, as `Engine.block_names` returns them; None: all are one.
    """

    def __init__(
        self,
        jacobian: Jacobian | None,
        parameters: list[nn.Parameter],
        blocks: Mapping[nn.Parameter, str] | None = None,
    ):
        self.jacobian = jacobian
        self.parameters = parameters
        self._places = places_of(blocks, parameters)
        self._local = set() if jacobian is None else set(jacobian.used)
        self.local = slice(None)
        self._used: list[nn.Parameter] | None = None

    def exchange(self, table: ObjectiveTable) -> ObjectiveTable:
        """Turn the table of this process's objectives into that of all objectives that are weighed together."""
        return table

    def gramians(self) -> Tensor:
        """Compute the Gramians [B, M, M], one per block, the same on all processes that weigh together."""
        return self._no_gramians(0) if self.jacobian is None else self.jacobian.gramians()

    def weighted_sum(self, weights: Tensor, usable: Tensor) -> dict[nn.Parameter, Tensor]:
        """Compute the update sum_k w_k row_k over the usable objectives of all processes.

        Args:
            weights: [B, M].
            usable: [M] (bool); other rows may be NaN, and are not read.
        """
        weights, usable = weights[:, self.local], usable[self.local]
        gradients = {}
        if self.jacobian is not None and usable.any():
            everything = bool(usable.all())
            jacobian = self.jacobian if everything else self.jacobian.select(usable.nonzero().flatten())
            gradients = jacobian.weighted_sum(weights if everything else weights[:, usable])
        return add_gradients(gradients, self.parameters, self._used)

    def _no_gramians(self, objectives: int) -> Tensor:
        """Return zeros [B, M, M], to which each process adds its part."""
        blocks, device = max(self._places.values()) + 1, self.parameters[0].device
        return torch.zeros(blocks, objectives, objectives, dtype=torch.float64, device=device)

    def _gramians_of(self, objectives: int, columns: Iterable[tuple[Bucket, Tensor]]) -> Tensor:
        """Add up the processes' parts of the Gramians [B, M, M], each from the rows [M, C / W] of its own columns."""
        gramians = self._no_gramians(objectives)
        for bucket, rows in columns:
            for place, where in by_block(bucket.parts[rank()], self._places):
                of_block = rows[:, where]
                gramians[place] += inner(of_block, of_block)
        gramians = add_over_processes(gramians)
        return (gramians + gramians.mT) / 2

    def _pack(self, part: list[Piece], packed: Tensor) -> None:
        """Copy columns of the rows into `packed` [m_r, C]."""
        if self.jacobian is None:
            packed.zero_()
        else:
            for (p, start, stop), where in offsets(part):
                packed[:, where] = self.jacobian.columns(p, start, stop) if p in self._local else 0


class GatheredRows(LocalRows):
    """Rows of objectives that differ between several processes, weighed together.

    Each process receives all M rows of the columns that it owns, and computes their part of the Gramian. Then it weighs
    its own rows, and the updates are added up.
    """

    def exchange(self, table: ObjectiveTable) -> ObjectiveTable:
        """Concatenate the processes' tables."""
        numbers = torch.cat([table.numbers, table.labels.double()], dim=1)
        used = used_flags(self._local, self.parameters)
        heads = gather(torch.cat([torch.tensor([len(table)]).to(numbers), used.to(numbers)]))
        self._used = flagged(heads[:, 1:].sum(0), self.parameters)
        self._lengths = heads[:, 0].long().tolist()
        every, self.local = gather_uneven(numbers, self._lengths)
        return ObjectiveTable.of(every[:, :-2], every[:, -2:])

    def gramians(self) -> Tensor:
        """Compute the Gramians [B, M, M] of the rows of all processes."""
        assert self._used is not None
        cut = buckets(self._used, process_count(), max(self._lengths))
        return self._gramians_of(sum(self._lengths), in_turn(map(self._exchange, cut)))

    def _exchange(self, bucket: Bucket) -> Transfer:
        """Send the rows [m_r, C] of this process by columns, and receive the rows [M, C / W] of all processes."""
        local, width = self._lengths[rank()], bucket.widths[rank()]
        sizes = [local * w for w in bucket.widths]
        flat = torch.zeros(sum(sizes), dtype=bucket.dtype, device=bucket.device)
        for part, packed in zip(bucket.parts, flat.split(sizes), strict=True):
            self._pack(part, packed.view(local, -1) if local else packed[None])
        rows = flat.new_empty(sum(self._lengths), width)
        received = [m * width for m in self._lengths]
        work = distributed.all_to_all_single(rows.view(-1), flat, received, sizes, async_op=True)
        return Transfer(bucket, rows, work, flat)


class AddedRows(LocalRows):
    """Rows of objectives that several processes share: the rows [K, n] are added up.

    Each process receives the sums [K, n / W] of the columns that it owns, computes their part of the Gramian, and
    weighs them; then the update is gathered.
    """

    def exchange(self, table: ObjectiveTable) -> ObjectiveTable:
        """Add up the tables of all processes, whose objectives are the same."""
        numbers, self._objectives = table.numbers, len(table)
        used = used_flags(self._local, self.parameters)
        sums = add_over_processes(torch.cat([numbers.flatten(), used.to(numbers)]))
        self._used = flagged(sums[numbers.numel() :], self.parameters)
        return ObjectiveTable.of(sums[: numbers.numel()].view(numbers.shape), table.labels)

    def gramians(self) -> Tensor:
        """Compute the Gramians [B, K, K] of the summed rows."""
        self._sums: list[tuple[Bucket, Tensor]] = []
        gramians = self._gramians_of(self._objectives, self._receive())
        self.jacobian = None  # Free the rows: each process only needs its 1/W of the sums.
        return gramians

    def weighted_sum(self, weights: Tensor, usable: Tensor) -> dict[nn.Parameter, Tensor]:
        """Compute the update sum_k w_k row_k, each process its columns; see `LocalRows.weighted_sum`."""
        if not usable.any():
            return {}
        assert self._used is not None
        update = Gradients(self._used)
        for bucket, columns in in_turn(self._weigh(*sums, weights, usable) for sums in self._sums):
            update.put(bucket, columns)
        return update.by_parameter()

    def _receive(self) -> Iterator[tuple[Bucket, Tensor]]:
        """Store and yield the sums [K, C / W] of this process's columns."""
        assert self._used is not None
        cut = buckets(self._used, process_count(), self._objectives)
        for bucket, received in in_turn(map(self._exchange, cut)):
            self._sums.append((bucket, self._summed(bucket, received)))
            yield self._sums[-1]

    def _exchange(self, bucket: Bucket) -> Transfer:
        """Send the rows [K, C] of this process by columns; `_summed` reads the result."""
        if bucket.device.type in SUMMED_HERE:
            return self._send_parts(bucket)
        flat = bucket.zeros(process_count(), self._objectives)
        for part, packed in zip(bucket.parts, flat, strict=True):
            self._pack(part, packed)
        sums = torch.empty_like(flat[0])
        return Transfer(bucket, sums, reduce_scatter_single(sums.view(-1), flat.view(-1), async_op=True), flat)

    def _send_parts(self, bucket: Bucket) -> Transfer:
        """Send each process its part, and receive the others' rows [W - 1, K, C / W] of this process's part."""
        k, widths = self._objectives, bucket.widths
        sizes = [0 if q == rank() else k * width for q, width in enumerate(widths)]
        flat = torch.empty(sum(sizes), dtype=bucket.dtype, device=bucket.device)
        for q, packed in enumerate(flat.split(sizes)):
            if q != rank():
                self._pack(bucket.parts[q], packed.view(k, -1))
        rows = flat.new_empty(process_count() - 1, k, widths[rank()])
        received = [0 if q == rank() else rows[0].numel() for q in range(process_count())]
        work = distributed.all_to_all_single(rows.view(-1), flat, received, sizes, async_op=True)
        return Transfer(bucket, rows, work, flat)

    def _summed(self, bucket: Bucket, received: Tensor) -> Tensor:
        """Return the sums [K, C / W] over all processes: as received, or the others' rows plus this process's."""
        if bucket.device.type not in SUMMED_HERE:
            return received
        sums = received[0] if len(received) == 1 else received.sum(0)
        if self.jacobian is not None:
            for (p, start, stop), where in offsets(bucket.parts[rank()]):
                if p in self._local:
                    sums[:, where] += self.jacobian.columns(p, start, stop)
        return sums

    def _weigh(self, bucket: Bucket, sums: Tensor, weights: Tensor, usable: Tensor) -> Transfer:
        """Compute this process's columns of the update; gather all columns if the parameters are whole."""
        if not usable.all():
            weights, sums = weights[:, usable], sums[usable]
        local = sums.new_zeros(sums.shape[1])
        for place, where in by_block(bucket.parts[rank()], self._places):
            local[where] = combine(weights[place], sums[:, where])
        if bucket.sharded:
            return Transfer(bucket, local, None, local)
        local = functional.pad(local, (0, max(bucket.widths) - len(local)))  # A gather needs parts of equal length.
        columns = local.new_empty(process_count(), len(local))
        return Transfer(bucket, columns, all_gather_single(columns.view(-1), local, async_op=True), local)

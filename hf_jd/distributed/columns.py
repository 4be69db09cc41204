"""Assign the Jacobian's columns (the parameters' elements) to processes, and pack them into buckets.

Each process owns some columns: it receives their rows from all processes, and computes their part of the Gramian and
of the update. A bucket is what one collective call carries: a slice of every process's columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, groupby, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BUCKET_BYTES = 32 * 1024 * 1024
"""The size of a bucket on one process, with all rows and columns."""


class Piece(NamedTuple):
    """Consecutive elements of a flattened parameter."""

    parameter: nn.Parameter
    start: int
    stop: int


@dataclass(frozen=True)
class Bucket:
    """Columns that are sent together.

    Attributes:
        parts: [W] the pieces that each process owns.
        dtype: The parameters' dtype.
        sharded: Whether the parameters are sharded, each process owning its shard.
    """

    parts: list[list[Piece]]
    dtype: torch.dtype
    sharded: bool

    @property
    def widths(self) -> list[int]:
        """[W] the number of columns that each process owns."""
        return [sum(piece.stop - piece.start for piece in part) for part in self.parts]

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return next(part for part in self.parts if part)[0].parameter.device

    def zeros(self, *sizes: int) -> Tensor:
        """Return zeros [*sizes, columns], with the columns of the largest part: collectives need equal sizes."""
        return torch.zeros(*sizes, max(self.widths), dtype=self.dtype, device=self.device)


def buckets(parameters: Iterable[nn.Parameter], processes: int, rows: int) -> Iterator[Bucket]:
    """Cut the columns of J [rows, n] into buckets of at most `BUCKET_BYTES`, or of one column per process.

    A process owns 1/W of the columns; of sharded parameters, its shards.

    Args:
        parameters: In the same order on all processes.
        processes: W.
        rows: The number of rows to send.
    """
    # A bucket is one tensor, so it holds parameters of one dtype; sharded ones have other owners.
    kinds: dict[tuple[torch.dtype, bool], list[nn.Parameter]] = {}
    for p in parameters:
        kinds.setdefault((p.dtype, isinstance(p, DTensor)), []).append(p)
    for (dtype, sharded), group in kinds.items():
        columns = max(1, BUCKET_BYTES // (max(1, rows) * dtype.itemsize * processes))
        owned = _shards(group, processes) if sharded else _equal(group, processes)
        # Every bucket takes the next columns of each process, so that all of them receive in every call.
        for parts in zip_longest(*(_cut(pieces, columns) for pieces in owned), fillvalue=[]):
            yield Bucket(list(parts), dtype, sharded)


def _equal(parameters: list[nn.Parameter], processes: int) -> list[list[Piece]]:
    """Give each process the same number of columns, the last ones fewer: [W] lists of pieces."""
    total = sum(p.numel() for p in parameters)
    every = [Piece(p, 0, p.numel()) for p in parameters]
    parts = list(_cut(every, -(-total // processes))) if total else []
    return parts + [[]] * (processes - len(parts))


def _shards(parameters: list[nn.Parameter], processes: int) -> list[list[Piece]]:
    """Give each process the elements of its shards, along dimension 0 over all processes: [W] lists of pieces."""
    owned = []
    for q in range(processes):
        edges = [(shard_start(p, processes, q), shard_start(p, processes, q + 1)) for p in parameters]
        owned.append([Piece(p, *edge) for p, edge in zip(parameters, edges, strict=True)])
    return owned


def shard_start(parameter: Tensor, processes: int, q: int) -> int:
    """Return the first element, in the flattened parameter, of shard q, split along dimension 0 like `torch.chunk`."""
    rows = -(-len(parameter) // processes)
    return min(q * rows, len(parameter)) * (parameter.numel() // max(1, len(parameter)))


def _cut(pieces: list[Piece], columns: int) -> Iterator[list[Piece]]:
    """Cut consecutive pieces into parts of `columns` columns; the last part may have fewer."""
    part: list[Piece] = []
    room = columns
    for p, start, stop in pieces:
        while start < stop:
            end = min(stop, start + room)
            part.append(Piece(p, start, end))  # a large parameter spans several parts
            room -= end - start
            start = end
            if room == 0:
                yield part
                part, room = [], columns
    if part:
        yield part


def offsets(part: list[Piece]) -> list[tuple[Piece, slice]]:
    """Return the pieces of a part, with the slice of the part's columns that each one fills."""
    ends = list(accumulate(piece.stop - piece.start for piece in part))
    return [(piece, slice(end - (piece.stop - piece.start), end)) for piece, end in zip(part, ends, strict=True)]


def by_block(part: list[Piece], places: Mapping[nn.Parameter, int]) -> Iterator[tuple[int, slice]]:
    """Find each block's columns among a part's columns, joining neighbours of the same block.

    Args:
        part: The pieces.
        places: The index of each parameter's block.
    """
    for place, pieces in groupby(offsets(part), lambda offset: places[offset[0].parameter]):
        where = [columns for _, columns in pieces]
        yield place, slice(where[0].start, where[-1].stop)


def local_shard(parameter: DTensor, flat: Tensor) -> DTensor:
    """Build a tensor sharded like the parameter, from the elements `flat` of this process's shard."""
    local = flat.view(parameter.to_local().shape)
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )

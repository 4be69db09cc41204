"""Which columns of the Jacobian, elements of the parameters, each process owns, and in which buckets they travel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, groupby, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

BUCKET_BYTES = 32 * 1024 * 1024
"""Of one bucket on one process, all rows and columns of it together."""


class Piece(NamedTuple):
    """Consecutive elements of a flattened parameter."""

    parameter: nn.Parameter
    start: int
    stop: int


@dataclass(frozen=True)
class Bucket:
    """Columns that travel together.

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
        """[W] how many columns each process owns."""
        return [sum(piece.stop - piece.start for piece in part) for part in self.parts]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(part for part in self.parts if part)[0].parameter.device

    def zeros(self, *sizes: int) -> Tensor:
        """[*sizes, columns] zeros, for as many columns as the largest part has."""
        return torch.zeros(*sizes, max(self.widths), dtype=self.dtype, device=self.device)


def buckets(parameters: Iterable[nn.Parameter], processes: int, rows: int) -> Iterator[Bucket]:
    """Cuts the columns of J [rows, n] into buckets of at most `BUCKET_BYTES`, or of one column a process.

    A process owns 1/W of the columns, or the shards that it holds of sharded parameters.

    Args:
        parameters: In the same order on all processes.
        processes: W.
        rows: How many rows travel.
    """
    kinds: dict[tuple[torch.dtype, bool], list[nn.Parameter]] = {}
    for p in parameters:
        kinds.setdefault((p.dtype, isinstance(p, DTensor)), []).append(p)
    for (dtype, sharded), group in kinds.items():
        columns = max(1, BUCKET_BYTES // (max(1, rows) * dtype.itemsize * processes))
        owned = _shards(group, processes) if sharded else _equal(group, processes)
        for parts in zip_longest(*(_cut(pieces, columns) for pieces in owned), fillvalue=[]):
            yield Bucket(list(parts), dtype, sharded)


def _equal(parameters: list[nn.Parameter], processes: int) -> list[list[Piece]]:
    """[W] as many columns for each process, but for the last ones."""
    total = sum(p.numel() for p in parameters)
    every = [Piece(p, 0, p.numel()) for p in parameters]
    parts = list(_cut(every, -(-total // processes))) if total else []
    return parts + [[]] * (processes - len(parts))


def _shards(parameters: list[nn.Parameter], processes: int) -> list[list[Piece]]:
    """[W] the elements of each process's shards."""
    for p in parameters:
        if isinstance(p, DTensor) and (p.device_mesh.size() != processes or p.placements != (Shard(0),)):
            raise ValueError(
                f"A parameter is placed as {p.placements} on {p.device_mesh.size()} of {processes} processes; allowed "
                "is FSDP2 over all processes, along the first dimension (no replicas, as in HSDP)."
            )
    owned = []
    for q in range(processes):
        edges = [(shard_start(p, processes, q), shard_start(p, processes, q + 1)) for p in parameters]
        owned.append([Piece(p, *edge) for p, edge in zip(parameters, edges, strict=True)])
    return owned


def shard_start(parameter: Tensor, processes: int, q: int) -> int:
    """The first element of the flattened parameter in shard q of the first dimension, cut as `torch.chunk` cuts it."""
    rows = -(-len(parameter) // processes)
    return min(q * rows, len(parameter)) * (parameter.numel() // max(1, len(parameter)))


def _cut(pieces: list[Piece], columns: int) -> Iterator[list[Piece]]:
    """Consecutive pieces, cut into parts of `columns` columns; the last part has what is left."""
    part: list[Piece] = []
    room = columns
    for p, start, stop in pieces:
        while start < stop:
            end = min(stop, start + room)
            part.append(Piece(p, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield part
                part, room = [], columns
    if part:
        yield part


def offsets(part: list[Piece]) -> list[tuple[Piece, slice]]:
    """The pieces of a part, and where each lies in the part's columns."""
    ends = list(accumulate(piece.stop - piece.start for piece in part))
    return [(piece, slice(end - (piece.stop - piece.start), end)) for piece, end in zip(part, ends, strict=True)]


def by_block(part: list[Piece], places: Mapping[nn.Parameter, int]) -> Iterator[tuple[int, slice]]:
    """Where the columns of each block lie in a part's columns; neighbours of one block are taken together.

    Args:
        part: The pieces.
        places: Which block each parameter belongs to.
    """
    for place, pieces in groupby(offsets(part), lambda found: places[found[0].parameter]):
        where = [columns for _, columns in pieces]
        yield place, slice(where[0].start, where[-1].stop)


def local_shard(parameter: DTensor, flat: Tensor) -> DTensor:
    """The sharded tensor, shaped like the parameter, of which this process holds the elements `flat`."""
    local = flat.view(parameter.to_local().shape)
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )

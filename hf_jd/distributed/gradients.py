"""Add up the gradients of all processes: in full for whole parameters, the local shard for sharded ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from hf_jd._compat import reduce_scatter_single
from hf_jd.distributed.columns import Bucket, buckets, local_shard, offsets, shard_start
from hf_jd.distributed.processes import add_over_processes, process_count, rank


class Transfer(NamedTuple):
    """A collective call in progress.

    Attributes:
        bucket: The columns.
        tensor: Receives the result.
        work: Signals the end of the call; None if there is nothing to wait for.
        buffer: The tensor being sent, which has to live until then.
    """

    bucket: Bucket
    tensor: Tensor
    work: distributed.Work | None
    buffer: Tensor


def in_turn(sent: Iterable[Transfer]) -> Iterator[tuple[Bucket, Tensor]]:
    """Yield results as they arrive, while the next bucket is packed and sent: two are in memory at a time."""
    pending: deque[Transfer] = deque()
    for item in sent:
        pending.append(item)
        if len(pending) > 1:
            yield _arrived(pending.popleft())
    while pending:
        yield _arrived(pending.popleft())


def _arrived(sent: Transfer) -> tuple[Bucket, Tensor]:
    if sent.work is not None:
        sent.work.wait()
    return sent.bucket, sent.tensor


def used_flags(used: Collection[nn.Parameter], parameters: list[nn.Parameter]) -> Tensor:
    """Return [P] float64, 1 for the parameters that are used."""
    return torch.tensor([float(p in used) for p in parameters], dtype=torch.float64, device=parameters[0].device)


def flagged(flags: Tensor, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters with a flag [P]: those that no process used get no gradient, as with autograd."""
    return [p for p, flag in zip(parameters, flags.tolist(), strict=True) if flag]


def add_gradients(
    gradients: dict[nn.Parameter, Tensor], parameters: list[nn.Parameter], used: list[nn.Parameter] | None = None
) -> dict[nn.Parameter, Tensor]:
    """Sum gradients over all processes: an all-reduce, or a reduce-scatter to the shards.

    Each process sends 2 b n (W - 1) / W bytes for n elements of b bytes; to shards, b n (W - 1) / W.

    Args:
        gradients: This process's gradients, of whole parameters.
        parameters: All trainable parameters, in the same order everywhere.
        used: The parameters that some process used, if already known.
    """
    if process_count() == 1 and not any(isinstance(p, DTensor) for p in gradients):
        return gradients
    if used is None:
        used = flagged(add_over_processes(used_flags(gradients, parameters)), parameters)
    total = Gradients(used)
    for bucket, sums in in_turn(_send_sum(bucket, gradients) for bucket in buckets(used, process_count(), 1)):
        total.put(bucket, sums)
    return total.by_parameter()


def _send_sum(bucket: Bucket, gradients: dict[nn.Parameter, Tensor]) -> Transfer:
    """Start summing a bucket over processes: [W, columns] of all parts, or [columns] of this process's part."""
    flat = bucket.zeros(len(bucket.parts))
    for part, values in zip(bucket.parts, flat, strict=True):
        for (p, start, stop), where in offsets(part):
            if p in gradients:
                values[where] = gradients[p].reshape(-1)[start:stop]
    if process_count() == 1:
        return Transfer(bucket, flat[0] if bucket.sharded else flat, None, flat)
    if bucket.sharded:
        received = torch.empty_like(flat[0])
        return Transfer(bucket, received, reduce_scatter_single(received, flat.view(-1), async_op=True), flat)
    return Transfer(bucket, flat, distributed.all_reduce(flat, async_op=True), flat)


class Gradients:
    """One gradient per parameter, assembled from buckets.

    Args:
        parameters: The parameters; a sharded one gets the gradient of its local shard.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self._flat: dict[nn.Parameter, Tensor] = {}
        for p in parameters:
            local = p.to_local() if isinstance(p, DTensor) else p
            self._flat[p] = torch.empty(local.numel(), dtype=p.dtype, device=local.device)

    def put(self, bucket: Bucket, values: Tensor) -> None:
        """Store the columns of a bucket: [W, columns], or [columns] of this process's shards."""
        if bucket.sharded:
            for (p, start, stop), where in offsets(bucket.parts[rank()]):
                before = shard_start(p, process_count(), rank())
                self._flat[p][start - before : stop - before] = values[where]
            return
        for part, columns in zip(bucket.parts, values, strict=True):
            for (p, start, stop), where in offsets(part):
                self._flat[p][start:stop] = columns[where]

    def by_parameter(self) -> dict[nn.Parameter, Tensor]:
        """Return the gradients, shaped and sharded like the parameters."""
        return {p: local_shard(p, g) if isinstance(p, DTensor) else g.view(p.shape) for p, g in self._flat.items()}

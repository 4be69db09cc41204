"""The gradients of all processes -> one update: full for parameters that each process has whole, else of its shard."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from hf_jd._compat import reduce_scatter_single
from hf_jd.distributed.columns import Bucket, buckets, local_shard, offsets, shard_start
from hf_jd.distributed.processes import add_over_processes, process_count, rank


class Sent(NamedTuple):
    """A collective under way.

    Attributes:
        bucket: The columns.
        tensor: What is received once `work` is done.
        work: What to wait for, if anything.
        buffer: What is being sent, kept until then.
    """

    bucket: Bucket
    tensor: Tensor
    work: distributed.Work | None
    buffer: Tensor


def in_turn(sent: Iterable[Sent]) -> Iterator[tuple[Bucket, Tensor]]:
    """What arrives, while the next bucket is packed and sent: two of them are in memory at a time."""
    under_way: deque[Sent] = deque()
    for item in sent:
        under_way.append(item)
        if len(under_way) > 1:
            yield _arrived(under_way.popleft())
    while under_way:
        yield _arrived(under_way.popleft())


def _arrived(sent: Sent) -> tuple[Bucket, Tensor]:
    if sent.work is not None:
        sent.work.wait()
    return sent.bucket, sent.tensor


def used_anywhere(used: Iterable[nn.Parameter], parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that some process used: the others keep no gradient, as autograd would leave them."""
    flags = used_flags(used, parameters)
    return [p for p, flag in zip(parameters, add_over_processes(flags).tolist(), strict=True) if flag]


def used_flags(used: Iterable[nn.Parameter], parameters: list[nn.Parameter]) -> Tensor:
    """[P] float64, 1 for the parameters that are used."""
    used = set(used)
    return torch.tensor([float(p in used) for p in parameters], dtype=torch.float64, device=parameters[0].device)


def add_gradients(
    gradients: dict[nn.Parameter, Tensor], parameters: list[nn.Parameter], used: list[nn.Parameter] | None = None
) -> dict[nn.Parameter, Tensor]:
    """The sum of gradients over all processes: an all-reduce, or a reduce-scatter to the shards.

    Bytes sent by each process, for n elements of b bytes: 2 b n (W - 1) / W, to shards b n (W - 1) / W.

    Args:
        gradients: Those of this process, of whole parameters.
        parameters: All trainable parameters, in the same order everywhere.
        used: Those that some process used, if that is known already.
    """
    if process_count() == 1 and not any(isinstance(p, DTensor) for p in gradients):
        return gradients
    if used is None:
        used = list(gradients) if process_count() == 1 else used_anywhere(gradients, parameters)
    total = Gradients(used)
    for bucket, sums in in_turn(_send_sum(bucket, gradients) for bucket in buckets(used, process_count(), 1)):
        total.put(bucket, sums)
    return total.by_parameter()


def _send_sum(bucket: Bucket, gradients: dict[nn.Parameter, Tensor]) -> Sent:
    """[W, columns] of all parts, or [columns] of this process's, of the sum over processes."""
    flat = bucket.zeros(len(bucket.parts))
    for part, values in zip(bucket.parts, flat, strict=True):
        for (p, start, stop), where in offsets(part):
            if p in gradients:
                values[where] = gradients[p].reshape(-1)[start:stop]
    if process_count() == 1:
        return Sent(bucket, flat[0] if bucket.sharded else flat, None, flat)
    if bucket.sharded:
        received = torch.empty_like(flat[0])
        return Sent(bucket, received, reduce_scatter_single(received, flat.view(-1), async_op=True), flat)
    return Sent(bucket, flat, distributed.all_reduce(flat, async_op=True), flat)


class Gradients:
    """A gradient for each parameter, put together from buckets.

    Args:
        parameters: Whose; each of them gets the gradient of its shard where it is sharded.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self._flat: dict[nn.Parameter, Tensor] = {}
        for p in parameters:
            local = p.to_local() if isinstance(p, DTensor) else p
            self._flat[p] = torch.empty(local.numel(), dtype=p.dtype, device=local.device)

    def put(self, bucket: Bucket, values: Tensor) -> None:
        """Takes the columns of a bucket: [W, columns], or [columns] of this process's shards."""
        if bucket.sharded:
            for (p, start, stop), where in offsets(bucket.parts[rank()]):
                before = shard_start(p, process_count(), rank())
                self._flat[p][start - before : stop - before] = values[where]
            return
        for part, columns in zip(bucket.parts, values, strict=True):
            for (p, start, stop), where in offsets(part):
                self._flat[p][start:stop] = columns[where]

    def by_parameter(self) -> dict[nn.Parameter, Tensor]:
        """The gradients, of the parameters' shapes, sharded as they are."""
        return {p: local_shard(p, g) if isinstance(p, DTensor) else g.view(p.shape) for p, g in self._flat.items()}

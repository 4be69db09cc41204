"""`--jd_sampler stratified`: an order of the examples in which every update has its share of every group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler


class StratifiedSampler(Sampler[int]):
    """Orders an epoch's examples so that every update has each group's share of them, within one example.

    An update is `update_size` examples in a row (accelerate gives every process its batches of them in turn), and what
    remains at the end of an epoch. Inside an update, every batch has its share of the update's groups in the same way.
    The order depends on the seed and the epoch alone, so an epoch can be resumed anywhere.

    Args:
        groups: The group of each example.
        update_size: How many examples an update takes, over micro-batches and processes.
        batch_size: How many examples a batch of one process takes.
        length: How many examples an epoch has: if more than there are, some come twice; if fewer, some don't come.
        seed: Of the order.
        epoch: Says which epoch it is, when one begins.
    """

    def __init__(
        self,
        groups: Sequence[str],
        update_size: int,
        batch_size: int,
        length: int,
        seed: int,
        epoch: Callable[[], int],
    ):
        ids = {name: k for k, name in enumerate(sorted(set(groups)))}
        self.groups = torch.tensor([ids[group] for group in groups])
        self.update_size = update_size
        self.batch_size = batch_size
        self.length = length
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        for update in stratified(self.groups, self.length, self.update_size, generator):
            for batch in stratified(self.groups[update], len(update), self.batch_size, generator):
                yield from update[batch[torch.randperm(len(batch), generator=generator)]].tolist()


def stratified(groups: Tensor, length: int, size: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Divides examples among blocks, with each group's share of them in every block, within one example.

    Args:
        groups: [N] each example's group.
        length: How many examples are divided; N uses each one once.
        size: Of a block; the last one may be smaller.
        generator: Of the choice.

    Returns:
        The positions of each block's examples.
    """
    _, groups, counts = groups.unique(return_inverse=True, return_counts=True)
    table = block_counts(counts, length, size, generator)
    order = torch.randperm(len(groups), generator=generator)
    order = order[groups[order].argsort(stable=True)]
    taken = table.sum(0)
    group = torch.arange(len(counts)).repeat_interleave(taken)
    within = torch.arange(length) - (taken.cumsum(0) - taken)[group]
    examples = order[(counts.cumsum(0) - counts)[group] + within % counts[group]]
    block = torch.arange(len(table)).repeat(len(counts)).repeat_interleave(table.T.flatten())
    return examples[block.argsort(stable=True)].split(table.sum(1).tolist())


def block_counts(counts: Tensor, length: int, size: int, generator: torch.Generator) -> Tensor:
    """How many examples of each group each block gets: its share of the block, rounded up or down.

    With s_k the share of group k in all examples, a block of U gets U s_k of it, rounded so that the blocks' sizes and
    the groups' totals (length * s_k, rounded up or down) are right. Those of the full blocks that round up for group k
    are spread evenly: the groups lie on a circle as arcs of the lengths of their fractions, and a block takes the
    groups that it meets at whole distances from its own point; the points follow each other at the golden ratio.

    Args:
        counts: [K] how many examples there are of each group, positive.
        length: How many examples are divided among blocks.
        size: Of a block; the last one is smaller where `length` is no multiple.
        generator: Of the choice where there is one.

    Returns:
        [blocks, K].
    """
    total = int(counts.sum())
    full, rest = divmod(length, size)
    shuffled = torch.randperm(len(counts), generator=generator)
    counts = counts[shuffled]
    in_full, in_rest = _rounded(full * size * counts, rest * counts, total)
    low = size * counts // total
    ends = (in_full - full * low).cumsum(0)
    ends = torch.cat([ends.new_zeros(1), ends])
    points = _spread(full, generator)
    # Of the integers before each end, those that are equal to the point, modulo the number of blocks.
    table = low + torch.div(ends - 1 - points[:, None], max(full, 1), rounding_mode="floor").diff(dim=1)
    if rest:
        table = torch.cat([table, in_rest[None]])
    return table[:, shuffled.argsort()]


def _spread(n: int, generator: torch.Generator) -> Tensor:
    """Return the integers below n in an order that fills every interval evenly from the first one on."""
    golden = (torch.arange(n, dtype=torch.float64) * ((5**0.5 - 1) / 2)) % 1
    start = int(torch.randint(max(n, 1), (), generator=generator))
    return (golden.argsort().argsort() + start) % max(n, 1)


def _rounded(first: Tensor, second: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Round first / total, second / total and their sum [K], each up or down, so that both keep their (integer) sums.

    There is always such a rounding (a transportation polytope with integer margins has integer vertices). By default
    one of a group's two fractions is rounded up; as many groups as needed round up both, or neither.
    """
    a, b = (first % total).tolist(), (second % total).tolist()
    left_a, left_b = sum(a) // total, sum(b) // total
    open_ = {k for k in range(len(a)) if a[k] or b[k]}
    large = [k for k in open_ if a[k] + b[k] > total]
    both = set(large[: max(left_a + left_b - len(open_), 0)])
    left_a, left_b = left_a - len(both), left_b - len(both)
    only_a, only_b = [k for k in open_ if not b[k]], [k for k in open_ if not a[k]]
    neither = {*only_a[left_a:], *only_b[left_b:]}
    small = [k for k in open_ - neither if a[k] + b[k] < total]
    neither |= set(small[: max(len(open_ - both - neither) - left_a - left_b, 0)])
    # Those that can only be rounded up in one of the two come first and last.
    free = sorted(open_ - both - neither, key=lambda k: bool(b[k]) - bool(a[k]))
    up_a, up_b = both | set(free[:left_a]), both | set(free[left_a:])
    return first // total + _ones(up_a, len(a)), second // total + _ones(up_b, len(a))


def _ones(where: set[int], n: int) -> Tensor:
    return torch.tensor([int(k in where) for k in range(n)])

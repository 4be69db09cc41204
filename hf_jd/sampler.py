"""`--jd_sampler stratified`: order the examples so that every update has its share of every group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler


class StratifiedSampler(Sampler[int]):
    """Orders an epoch's examples so that every update has its share of each group, to within one example.

    An update is `update_size` consecutive examples (accelerate hands their batches to the processes in turn); the last
    one of an epoch may be smaller. Within an update, every batch has its share of the update's groups in the same way.
    The order depends only on the seed and the epoch, so an epoch can be resumed anywhere.

    Args:
        groups: The group of each example.
        update_size: The number of examples per update, over micro-batches and processes.
        batch_size: The number of examples per batch of one process.
        length: The number of examples per epoch: with more than there are, some come twice; with fewer, some are left
            out.
        seed: The seed of the order.
        epoch: Returns the current epoch.
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
    """Divide examples among blocks so that every block has its share of each group, to within one example.

    Args:
        groups: [N] each example's group.
        length: The number of examples to divide; N uses each one once.
        size: The size of a block; the last one may be smaller.
        generator: Draws the order.

    Returns:
        The indices of each block's examples.
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
    """Compute how many examples of each group each block gets: its share of the block, rounded up or down.

    If group k has a share s_k of all examples, a block of U gets U s_k of them, rounded so that the blocks' sizes and
    the groups' totals (length * s_k, rounded up or down) are right. The full blocks that round up for group k are
    spread evenly: groups are arcs on a circle, as long as their fractions; a block takes the groups at whole distances
    from its point, and the blocks' points follow the golden ratio.

    Args:
        counts: [K] the number of examples of each group, positive.
        length: The number of examples to divide among blocks.
        size: The size of a block; the last one is smaller if `length` is no multiple.
        generator: Draws where there is a choice.

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
    # Count the integers before each end that equal the point modulo the number of blocks.
    table = low + torch.div(ends - 1 - points[:, None], max(full, 1), rounding_mode="floor").diff(dim=1)
    if rest:
        table = torch.cat([table, in_rest[None]])
    return table[:, shuffled.argsort()]


def _spread(n: int, generator: torch.Generator) -> Tensor:
    """Return the integers below n in an order in which every prefix is spread evenly over [0, n)."""
    golden = (torch.arange(n, dtype=torch.float64) * ((5**0.5 - 1) / 2)) % 1
    start = int(torch.randint(max(n, 1), (), generator=generator))
    return (golden.argsort().argsort() + start) % max(n, 1)


def _rounded(first: Tensor, second: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Round first / total, second / total and their sum [K], each up or down, so that both keep their (integer) sums.

    Such a rounding always exists (a transportation polytope with integer margins has integer vertices). By default, one
    of a group's two fractions is rounded up; as many groups as needed round up both, or neither.
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
    # Groups that can only be rounded up in one of the two come first and last.
    free = sorted(open_ - both - neither, key=lambda k: bool(b[k]) - bool(a[k]))
    up_a, up_b = both | set(free[:left_a]), both | set(free[left_a:])
    return first // total + _ones(up_a, len(a)), second // total + _ones(up_b, len(a))


def _ones(where: set[int], n: int) -> Tensor:
    return torch.tensor([int(k in where) for k in range(n)])

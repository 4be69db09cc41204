"""Losses -> objectives: which of them share a row, and what makes the objectives' mean the loss of Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Loss(NamedTuple):
    """One of a micro-batch's losses.

    Attributes:
        values: [] the whole batch's, [B] one an instance, or [B, ...], one a token.
        counted: Which of them count (bool), the same shape.
        denominator: [] what their sum is divided by; None where that is known only when all have been counted.
    """

    values: Tensor
    counted: Tensor
    denominator: Tensor | None


@dataclass(frozen=True)
class Part:
    """Objectives to which a micro-batch adds something: S segments, by K losses.

    Attributes:
        losses: [S K] sums of losses, divided by `denominators`, those of the first loss first; with a graph.
        segments: [B] the segment of each instance of the micro-batch, -1 for none.
        groups: [S K] the id of each objective's group, -1 for none.
        names: [S K] the position of each objective's loss among the losses.
        counts: [S K] how many losses (of tokens, instances or batches) each objective sums.
        denominators: [S K] what the sums were divided by; None where that is known only when all have been counted.
        finite: [B] (bool) whether an instance's losses are finite; where one isn't, the instance is in no objective.
        columns: K.
        broken: How many losses of the whole batch aren't finite; they are left out.
    """

    losses: Tensor
    segments: Tensor
    groups: Tensor
    names: Tensor
    counts: Tensor
    denominators: Tensor | None
    finite: Tensor
    columns: int = 1
    broken: int = 0

    def matrix(self) -> Tensor:
        """The losses [S], or [S, K], as the engine takes them."""
        return self.losses if self.columns == 1 else self.losses.view(self.columns, -1).T

    def table(self) -> Tensor:
        """[S K, 5], float64, without a graph, for all that follows: losses, sums of losses, counts, groups, names."""
        losses = self.losses.detach().double()
        sums = losses if self.denominators is None else losses * self.denominators
        return torch.stack([losses, sums, self.counts.double(), self.groups.double(), self.names.double()], dim=1)

    def detached(self) -> Part:
        """The same without a graph."""
        return replace(self, losses=self.losses.detach())


def by_instance(losses: Sequence[Loss], groups: Tensor, present: Tensor) -> Part:
    """One objective an instance that has any loss at all, by each loss.

    Args:
        losses: K losses, of instances or tokens.
        groups: [B] group ids, -1 for none.
        present: [G] unused here.
    """
    sums, counts, finite = _instance_sums(losses, len(groups))
    has_loss = (counts > 0).any(1)
    segments = torch.where(has_loss, has_loss.cumsum(0) - 1, -1)
    return _part(losses, sums[has_loss], counts[has_loss], segments, groups[has_loss], finite)


def by_group(losses: Sequence[Loss], groups: Tensor, present: Tensor) -> Part:
    """One objective for each of the groups that are present in the update; see `by_instance`.

    Args:
        losses: One loss, of instances or tokens.
        groups: [B] group ids.
        present: [G] the sorted ids of the groups of the whole update.
    """
    sums, counts, finite = _instance_sums(losses, len(groups))
    has_loss = (counts > 0).any(1)
    segments = torch.where(has_loss, torch.searchsorted(present, groups), -1)
    totals = sums.new_zeros(len(present), 1).index_add(0, segments[has_loss], sums[has_loss])
    group_counts = counts.new_zeros(len(present), 1).index_add(0, segments[has_loss], counts[has_loss])
    return _part(losses, totals, group_counts, segments, present, finite)


def by_loss(losses: Sequence[Loss], groups: Tensor, present: Tensor, first: int = 0) -> Part:
    """One objective for each loss, of all instances together.

    Args:
        losses: K losses.
        groups: [B] unused, but for the number of instances.
        present: [G] unused here.
        first: The position of the first one among all losses.
    """
    finite = torch.ones_like(groups, dtype=torch.bool)
    for loss in losses:
        if loss.values.ndim:
            finite &= _instance_sums([loss], len(groups))[2]
    sums, counts, broken = [], [], 0
    for loss in losses:
        whole = loss.values.ndim == 0
        total = loss.values if whole else loss.values[finite].masked_fill(~loss.counted[finite], 0).sum()
        count = (loss.counted & total.isfinite()) if whole else loss.counted[finite].sum()
        broken += int(whole and not total.isfinite())
        # What doesn't count has no graph, in which NaN times 0 would be NaN.
        sums.append(total if count else torch.zeros_like(total))
        counts.append(count.long())
    none = torch.full_like(groups[:1], -1)
    part = _part(losses, torch.stack(sums)[None], torch.stack(counts)[None], torch.zeros_like(groups), none, finite)
    return replace(part, broken=broken, names=part.names + first)


def _instance_sums(losses: Sequence[Loss], instances: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each instance's summed losses [B, K]; how many those sum [B, K], 0 where one isn't finite; and where all are."""
    counted = [loss.counted.reshape(instances, -1) for loss in losses]
    values = [loss.values.reshape(c.shape).masked_fill(~c, 0).sum(1) for loss, c in zip(losses, counted, strict=True)]
    sums = torch.stack(values, dim=1)
    finite = sums.isfinite().all(1)
    return sums, torch.stack([c.sum(1) for c in counted], dim=1) * finite[:, None], finite


def _part(
    losses: Sequence[Loss], sums: Tensor, counts: Tensor, segments: Tensor, groups: Tensor, finite: Tensor
) -> Part:
    """A part from sums and counts [S, K] and groups [S]."""
    names = torch.arange(len(losses), device=segments.device).repeat_interleave(len(sums))
    flat, denominators = sums.T.flatten(), None
    if losses[0].denominator is not None:
        known = [loss.denominator for loss in losses if loss.denominator is not None]
        denominators = torch.stack([d.to(segments.device, torch.float64) for d in known])[names]
        flat = flat / denominators.to(flat.dtype)
    return Part(
        flat, segments, groups.repeat(len(losses)), names, counts.T.flatten(), denominators, finite, len(losses)
    )


@dataclass(frozen=True)
class Kind:
    """A kind of objectives.

    Attributes:
        split: Divides a micro-batch's losses among objectives.
        shared: Whether micro-batches and processes add to the same objectives, or each bring their own.
        of_instances: Whether losses have to be those of instances, or of their tokens.
        several: Whether losses are told apart by name.
        of_batches: Whether a micro-batch is one objective, whatever its loss.
        of_rewards: Whether they are the rewards of generated completions, by name.
    """

    split: Callable[[Sequence[Loss], Tensor, Tensor], Part]
    shared: bool
    of_instances: bool
    several: bool
    of_batches: bool = False
    of_rewards: bool = False


OBJECTIVES = {
    "instance": Kind(by_instance, shared=False, of_instances=True, several=False),
    "group": Kind(by_group, shared=True, of_instances=True, several=False),
    "loss": Kind(by_loss, shared=True, of_instances=False, several=True),
    "instance_loss": Kind(by_instance, shared=False, of_instances=True, several=True),
    "batch": Kind(by_loss, shared=False, of_instances=False, several=False, of_batches=True),
    "reward": Kind(by_loss, shared=True, of_instances=False, several=False, of_rewards=True),
}


@dataclass(frozen=True)
class Objectives:
    """The M rows of an update, all micro-batches and processes together; float64, without a graph.

    Attributes:
        table: [M, 5] losses, sums of losses, counts, groups and names; see `Part.table`.
        own_mean: Whether each objective is its own mean, instead of its share of the whole.
        normalised: Whether the losses are already divided by the number of losses of the update.
        whole: The name of a loss of whole batches beside others: all its rows are one objective. None: there is none.
        valued: Whether the losses' values are known: a loss that was split at the model's outputs may have gradients
            only.
    """

    table: Tensor
    own_mean: bool
    normalised: bool
    whole: int | None = None
    valued: bool = True

    @property
    def losses(self) -> Tensor:
        """[M]."""
        return self.table[:, 0]

    @property
    def counts(self) -> Tensor:
        """[M] how many losses each row sums."""
        return self.table[:, 2]

    @property
    def means(self) -> Tensor:
        """[M] each row's loss a token (or instance, or batch), for people to read."""
        return self.table[:, 1] / self.counts

    @property
    def groups(self) -> Tensor:
        """[M] group ids."""
        return self.table[:, 3].long()

    @property
    def names(self) -> Tensor:
        """[M] positions among the losses."""
        return self.table[:, 4].long()

    def usable(self, gramian: Tensor) -> Tensor:
        """[M] (bool): the rows that have losses, and are finite as these are."""
        finite = gramian.diagonal().isfinite().to(self.table.device)
        return (self.counts > 0) & finite & (self.losses.isfinite() if self.valued else True)

    def broken(self, usable: Tensor) -> Tensor:
        """[M] (bool): the objectives that have losses, and aren't usable: their loss or row isn't finite."""
        return (self.counts > 0).logical_and(~usable)

    def members(self, usable: Tensor) -> Tensor:
        """Which objective each usable row belongs to: one of its own, or that of the whole batches, the last one."""
        names = self.names[usable]
        rows = torch.arange(len(names), device=names.device)
        if self.whole is None:
            return rows
        return rows.masked_fill(names == self.whole, len(names)).unique(return_inverse=True)[1]

    def number(self, usable: Tensor) -> int:
        """M', how many objectives the usable rows make; at least 1."""
        members = self.members(usable)
        return int(members.max()) + 1 if len(members) else 1

    def factors(self, usable: Tensor) -> Tensor:
        """[M] what turns each loss (and row) into its objective, whose mean over the M' objectives is Trainer's loss.

        Trainer minimises sum_k loss_k, with loss_k already divided by the number of tokens. An objective is therefore
        M' loss_k. Where nothing is divided yet, it is M' times a sum by the number of losses of that name; or, when
        each objective is its own mean, its sum by its count.
        """
        if self.own_mean:
            total = (self.counts * usable).sum() if self.normalised else 1
            return total / self.counts.clamp(min=1)
        m = self.number(usable)
        if self.normalised:
            return torch.full_like(self.counts, m)
        totals = torch.bincount(self.names, self.counts * usable)
        return m / totals.clamp(min=1)[self.names]

    def joined(self, usable: Tensor) -> Objectives:
        """The M' objectives that the usable rows make."""
        table, members = self.table[usable], self.members(usable)
        m = self.number(usable)
        sums = table.new_zeros(m, 3).index_add(0, members, table[:, :3])
        labels = table.new_zeros(m, 2).index_copy(0, members, table[:, 3:])
        return replace(self, table=torch.cat([sums, labels], dim=1))

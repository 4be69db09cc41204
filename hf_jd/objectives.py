"""Instances -> objectives: which instances share a row, and what makes the objectives' mean the loss of Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """A kind of objectives.

    Attributes:
        shared: Whether micro-batches and processes add to the same objectives, or each bring their own.
        of_instances: Whether each instance's part of a loss has to be known.
        several: Whether losses are told apart by name.
        of_batches: Whether a micro-batch is one objective, whatever its loss.
        of_rewards: Whether they are the rewards of generated completions, by name.
    """

    shared: bool
    of_instances: bool
    several: bool
    of_batches: bool = False
    of_rewards: bool = False


OBJECTIVES = {
    "instance": Kind(shared=False, of_instances=True, several=False),
    "group": Kind(shared=True, of_instances=True, several=False),
    "loss": Kind(shared=True, of_instances=False, several=True),
    "instance_loss": Kind(shared=False, of_instances=True, several=True),
    "batch": Kind(shared=False, of_instances=False, several=False, of_batches=True),
    "reward": Kind(shared=True, of_instances=False, several=False, of_rewards=True),
}


class Membership(NamedTuple):
    """The objectives of a micro-batch: S segments of instances, by K losses.

    Attributes:
        segments: [B] the segment of each instance, -1 for none.
        groups: [S K] the id of each objective's group, -1 for none; all segments of the first loss come first.
        names: [S K] the position of each objective's loss among the losses.
    """

    segments: Tensor
    groups: Tensor
    names: Tensor

    @property
    def labels(self) -> Tensor:
        """[S K, 2] the groups and names."""
        return torch.stack([self.groups, self.names], dim=1)

    def added(self, values: Tensor) -> Tensor:
        """The sums [S K] over the instances of each objective of what is known of each instance [B, K]."""
        total = values.new_zeros(len(self.groups) // max(1, values.shape[1]), values.shape[1])
        inside = self.segments >= 0
        return total.index_add(0, self.segments[inside], values[inside]).T.flatten()


def membership(kind: Kind, counted: Tensor, groups: Tensor | None, present: Tensor | None) -> Membership:
    """Says which objectives a micro-batch adds to.

    Args:
        kind: Of the objectives.
        counted: [B, K] (bool) whether an instance has any part of each of the K losses.
        groups: [B] group ids; None without a group column.
        present: [G] the sorted ids of the groups of the whole update; None without a group column.
    """
    some, k = counted.any(1), counted.shape[1]
    if kind.of_instances and not kind.shared:
        segments = torch.where(some, some.cumsum(0) - 1, -1)
        ids = segments.new_full((int(some.sum()),), -1) if groups is None else groups[some]
    elif kind.of_instances:
        assert groups is not None
        assert present is not None
        segments, ids = torch.where(some, torch.searchsorted(present, groups), -1), present
    else:
        segments, ids = some.long() - 1, torch.full_like(some[:1].long(), -1)
    names = torch.arange(k, device=counted.device).repeat_interleave(len(ids))
    return Membership(segments, ids.repeat(k), names)


@dataclass(frozen=True)
class ObjectiveTable:
    """What is known of M rows beside the rows themselves; without a graph.

    Attributes:
        losses: [M] float64, each row's part of Trainer's loss; NaN where values are not known.
        sums: [M] float64, the sum of the losses of its tokens (or instances, or batches).
        counts: [M] float64, how many these are; 0 where a row has none.
        groups: [M] int64 ids, -1 for none.
        names: [M] int64 positions among the losses.
    """

    losses: Tensor
    sums: Tensor
    counts: Tensor
    groups: Tensor
    names: Tensor

    def __len__(self) -> int:
        """M."""
        return len(self.counts)

    @property
    def means(self) -> Tensor:
        """[M] each row's loss per token (or instance, or batch), for people to read."""
        return self.sums / self.counts

    @property
    def numbers(self) -> Tensor:
        """[M, 3] what adds up over micro-batches and processes that share objectives."""
        return torch.stack([self.losses, self.sums, self.counts], dim=1)

    @property
    def labels(self) -> Tensor:
        """[M, 2] what tells objectives apart."""
        return torch.stack([self.groups, self.names], dim=1)

    @staticmethod
    def of(numbers: Tensor, labels: Tensor) -> ObjectiveTable:
        """The table with these `numbers` and `labels`."""
        return ObjectiveTable(*numbers.double().unbind(1), *labels.long().unbind(1))

    @staticmethod
    def cat(tables: Sequence[ObjectiveTable]) -> ObjectiveTable:
        """The rows of several tables, one below the other."""
        return ObjectiveTable.of(torch.cat([t.numbers for t in tables]), torch.cat([t.labels for t in tables]))

    @staticmethod
    def added(tables: Sequence[ObjectiveTable]) -> ObjectiveTable:
        """The sum of tables of the same objectives."""
        return ObjectiveTable.of(torch.stack([t.numbers for t in tables]).sum(0), tables[0].labels)


@dataclass(frozen=True)
class Objectives:
    """The M rows of an update, all micro-batches and processes together.

    Attributes:
        table: What is known of them.
        own_mean: Whether each objective is its own mean, instead of its share of the whole.
        normalised: Whether the rows are already shares of Trainer's loss, instead of sums.
        whole: The position of a loss of whole batches beside others: all its rows are one objective. None: there is
            none.
    """

    table: ObjectiveTable
    own_mean: bool
    normalised: bool
    whole: int | None = None

    def usable(self, gramian: Tensor) -> Tensor:
        """[M] (bool): the rows of something that counts, if they are finite."""
        return (self.table.counts > 0) & gramian.diagonal().isfinite().to(self.table.counts.device)

    def broken(self, usable: Tensor) -> Tensor:
        """[M] (bool): the rows of something that counts that aren't usable."""
        return (self.table.counts > 0) & ~usable

    def members(self, usable: Tensor) -> Tensor:
        """Which objective each usable row belongs to: one of its own, or that of the whole batches, the last one."""
        names = self.table.names[usable]
        rows = torch.arange(len(names), device=names.device)
        if self.whole is None:
            return rows
        return rows.masked_fill(names == self.whole, len(names)).unique(return_inverse=True)[1]

    def number(self, usable: Tensor) -> int:
        """M', how many objectives the usable rows make; at least 1."""
        members = self.members(usable)
        return int(members.max()) + 1 if len(members) else 1

    def factors(self, usable: Tensor) -> Tensor:
        """[M] what turns each row into its objective, whose mean over the M' objectives is Trainer's loss.

        A row that is already its share of Trainer's loss is multiplied by M'; one that is a sum, by M' over the number
        of all losses of that name. When each objective is its own mean, a sum is divided by its own number.
        """
        counts = self.table.counts
        if self.own_mean:
            total = (counts * usable).sum() if self.normalised else 1
            return total / counts.clamp(min=1)
        m = self.number(usable)
        if self.normalised:
            return torch.full_like(counts, m)
        totals = torch.bincount(self.table.names, counts * usable)
        return m / totals.clamp(min=1)[self.table.names]

    def joined(self, usable: Tensor) -> Objectives:
        """The M' objectives that the usable rows make."""
        members, m = self.members(usable), self.number(usable)
        numbers, labels = self.table.numbers[usable], self.table.labels[usable]
        numbers = numbers.new_zeros(m, 3).index_add(0, members, numbers)
        labels = labels.new_zeros(m, 2).index_copy(0, members, labels)
        return replace(self, table=ObjectiveTable.of(numbers, labels))

"""Instances -> objectives: which instances share a row, and by which factors the objectives' mean is Trainer's loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """A kind of objectives.

    Attributes:
        shared: Whether micro-batches and processes contribute to the same objectives, or each have their own.
        of_instances: Whether each instance's part of a loss is needed.
        several: Whether there are several losses by name.
        of_batches: Whether a micro-batch is one objective, whatever its loss.
        of_rewards: Whether objectives are the rewards of generated completions, by name.
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
        groups: [S K] the group id of each objective, -1 for none; all segments of the first loss come first.
        names: [S K] the index of each objective's loss among the losses.
    """

    segments: Tensor
    groups: Tensor
    names: Tensor

    def added(self, values: Tensor) -> Tensor:
        """Sum values of instances [B, K] over each objective: [S K]."""
        total = values.new_zeros(len(self.groups) // max(1, values.shape[1]), values.shape[1])
        inside = self.segments >= 0
        return total.index_add(0, self.segments[inside], values[inside]).T.flatten()


def membership(kind: Kind, counted: Tensor, groups: Tensor | None, present: Tensor | None) -> Membership:
    """Find the objectives that a micro-batch contributes to.

    Args:
        kind: The kind of objectives.
        counted: [B, K] (bool) whether an instance contributes to each of the K losses.
        groups: [B] group ids; None without a group column.
        present: [G] the sorted ids of all groups in the update; None without a group column.
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
    """The losses, counts and labels of M rows, without a graph.

    Attributes:
        losses: [M] float64, each row's part of Trainer's loss; NaN if unknown.
        sums: [M] float64, the summed losses of its tokens (or instances, or batches).
        counts: [M] float64, the number of these tokens (or instances, or batches); may be 0.
        groups: [M] int64 group ids, -1 for none.
        names: [M] int64 indices of the losses.
    """

    losses: Tensor
    sums: Tensor
    counts: Tensor
    groups: Tensor
    names: Tensor

    def __len__(self) -> int:
        """Return the number of rows, M."""
        return len(self.counts)

    @property
    def means(self) -> Tensor:
        """[M] each row's loss per token (or instance, or batch), for logs."""
        return self.sums / self.counts

    @property
    def numbers(self) -> Tensor:
        """[M, 3] the values that add up over micro-batches and processes with shared objectives."""
        return torch.stack([self.losses, self.sums, self.counts], dim=1)

    @property
    def labels(self) -> Tensor:
        """[M, 2] the groups and names, which identify an objective."""
        return torch.stack([self.groups, self.names], dim=1)

    @staticmethod
    def of(numbers: Tensor, labels: Tensor) -> ObjectiveTable:
        """Build a table from its `numbers` and `labels`."""
        return ObjectiveTable(*numbers.double().unbind(1), *labels.long().unbind(1))

    @staticmethod
    def cat(tables: Sequence[ObjectiveTable]) -> ObjectiveTable:
        """Concatenate tables."""
        return ObjectiveTable.of(torch.cat([t.numbers for t in tables]), torch.cat([t.labels for t in tables]))

    @staticmethod
    def added(tables: Sequence[ObjectiveTable]) -> ObjectiveTable:
        """Add up tables of the same objectives."""
        return ObjectiveTable.of(torch.stack([t.numbers for t in tables]).sum(0), tables[0].labels)


@dataclass(frozen=True)
class Objectives:
    """The M rows of an update, over all micro-batches and processes, and the M' objectives that the usable ones form.

    Attributes:
        table: Their losses, counts and labels.
        finite: [M] (bool) whether they are.
        own_mean: Whether each objective is its own mean, not a share of the whole loss.
        normalised: Whether the rows are already shares of Trainer's loss, not sums.
        whole: The index of a loss of whole batches, besides losses of instances: all its rows form one objective. None
            if there is no such loss.
    """

    table: ObjectiveTable
    finite: Tensor
    own_mean: bool
    normalised: bool
    whole: int | None = None

    @cached_property
    def usable(self) -> Tensor:
        """[M] (bool): the rows that are finite, and have tokens, instances or batches."""
        return (self.table.counts > 0) & self.finite

    @property
    def broken(self) -> Tensor:
        """[M] (bool): the rows with tokens, instances or batches that aren't finite."""
        return (self.table.counts > 0) & ~self.finite

    @cached_property
    def members(self) -> Tensor:
        """Each usable row's objective: its own, or the last one, which all rows of whole batches share."""
        names = self.table.names[self.usable]
        rows = torch.arange(len(names), device=names.device)
        if self.whole is None:
            return rows
        return rows.masked_fill(names == self.whole, len(names)).unique(return_inverse=True)[1]

    @cached_property
    def number(self) -> int:
        """M', at least 1."""
        return int(self.members.max()) + 1 if len(self.members) else 1

    @cached_property
    def factors(self) -> Tensor:
        """The factors [M] that turn rows into objectives whose mean over all M' is Trainer's loss.

        A row that is already a share of Trainer's loss is multiplied by M'; a sum, by M' over the count of all losses
        of that name. If each objective is its own mean, a sum is divided by its own count.
        """
        counts = self.table.counts
        if self.own_mean:
            total = (counts * self.usable).sum() if self.normalised else 1
            return total / counts.clamp(min=1)
        if self.normalised:
            return torch.full_like(counts, self.number)
        totals = torch.bincount(self.table.names, counts * self.usable)
        return self.number / totals.clamp(min=1)[self.table.names]

    def joined(self) -> ObjectiveTable:
        """Join the usable rows into their M' objectives."""
        numbers, labels = self.table.numbers[self.usable], self.table.labels[self.usable]
        numbers = numbers.new_zeros(self.number, 3).index_add(0, self.members, numbers)
        labels = labels.new_zeros(self.number, 2).index_copy(0, self.members, labels)
        return ObjectiveTable.of(numbers, labels)

"""Batches -> objectives: which instances share a row, and what makes the objectives' mean the loss of Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """What one micro-batch, or the micro-batches of one process, add to the m objectives.

    Attributes:
        losses: [m] sums of losses, divided by `denominator`; with a graph when they come from a forward pass.
        segments: [B] the objective of each instance of the micro-batch, -1 for none.
        groups: [m] the group's id of each objective, -1 for none.
        counts: [m] how many losses (of tokens or instances) each objective sums.
        denominator: What the sums were divided by; None where that is known only when all have been counted.
        finite: [B] (bool) whether an instance's loss is finite; where it isn't, the instance is in no objective.
    """

    losses: Tensor
    segments: Tensor
    groups: Tensor
    counts: Tensor
    denominator: Tensor | None
    finite: Tensor

    def table(self) -> Tensor:
        """[m, 4], float64, without a graph: losses, sums of losses, counts and groups, for all that follows."""
        losses = self.losses.detach().double()
        sums = losses if self.denominator is None else losses * self.denominator
        return torch.stack([losses, sums, self.counts.double(), self.groups.double()], dim=1)


def by_instance(losses: Tensor, counted: Tensor, groups: Tensor, present: Tensor, denominator: Tensor | None) -> Part:
    """One objective an instance that has any loss at all.

    Args:
        losses: [B, ...] unreduced losses.
        counted: [B, ...] (bool) which of them count.
        groups: [B] group ids, -1 for none.
        present: [K] unused here.
        denominator: What each sum is divided by, None for nothing.
    """
    sums, counts, finite = _instance_sums(losses, counted)
    has_loss = counts > 0
    segments = torch.where(has_loss, has_loss.cumsum(0) - 1, -1)
    sums = _divided(sums[has_loss], denominator)
    return Part(sums, segments, groups[has_loss], counts[has_loss], denominator, finite)


def by_group(losses: Tensor, counted: Tensor, groups: Tensor, present: Tensor, denominator: Tensor | None) -> Part:
    """One objective for each of the K groups that are present in the update; see `by_instance`.

    Args:
        losses: [B, ...] unreduced losses.
        counted: [B, ...] (bool) which of them count.
        groups: [B] group ids.
        present: [K] the sorted ids of the groups of the whole update.
        denominator: What each sum is divided by, None for nothing.
    """
    sums, counts, finite = _instance_sums(losses, counted)
    has_loss = counts > 0
    segments = torch.where(has_loss, torch.searchsorted(present, groups), -1)
    totals = sums.new_zeros(len(present)).index_add(0, segments[has_loss], sums[has_loss])
    group_counts = torch.zeros_like(present).index_add(0, segments[has_loss], counts[has_loss])
    return Part(_divided(totals, denominator), segments, present, group_counts, denominator, finite)


def _instance_sums(losses: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each instance's summed loss [B], how many losses that sums [B], 0 where it isn't finite, and where it is."""
    counted = counted.reshape(len(counted), -1)
    sums = losses.reshape(counted.shape).masked_fill(~counted, 0).sum(1)
    finite = sums.isfinite()
    return sums, counted.sum(1) * finite, finite


def _divided(sums: Tensor, denominator: Tensor | None) -> Tensor:
    return sums if denominator is None else sums / denominator


@dataclass(frozen=True)
class Kind:
    """A kind of objectives.

    Attributes:
        split: Divides a micro-batch's losses among objectives.
        shared: Whether micro-batches and processes add to the same objectives, or each bring their own.
    """

    split: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Part]
    shared: bool


OBJECTIVES = {"instance": Kind(by_instance, shared=False), "group": Kind(by_group, shared=True)}


@dataclass(frozen=True)
class Objectives:
    """The M objectives of an update, all micro-batches and processes together; float64, without a graph.

    Attributes:
        table: [M, 4] losses, sums of losses, counts and groups; see `Part.table`.
        own_mean: Whether each objective is its own mean, instead of its share of the whole.
        normalised: Whether the losses are already divided by the number of losses of the update.
    """

    table: Tensor
    own_mean: bool
    normalised: bool

    @property
    def groups(self) -> Tensor:
        """[M] group ids."""
        return self.table[:, 3].long()

    @property
    def counts(self) -> Tensor:
        """[M] how many losses each objective sums."""
        return self.table[:, 2]

    @property
    def means(self) -> Tensor:
        """[M] each objective's loss a token (or instance), for people to read."""
        return self.table[:, 1] / self.counts

    def usable(self, gramian: Tensor) -> Tensor:
        """[M] (bool): the objectives that have losses, and whose loss and row are finite."""
        return (self.counts > 0) & self.table[:, 0].isfinite() & gramian.diagonal().isfinite().to(self.table.device)

    def factors(self, usable: Tensor) -> Tensor:
        """[M] what turns each loss (and row) into its objective: the mean of the M' usable ones is Trainer's loss.

        Trainer minimises sum_k loss_k, with loss_k already divided by the number of tokens. An objective is therefore
        M' loss_k; or, when each is its own mean, its sum by its count.
        """
        if self.own_mean:
            return 1 / self.counts.clamp(min=1)
        m = usable.sum()
        return (m if self.normalised else m / self.counts[usable].sum().clamp(min=1)).expand(len(usable))

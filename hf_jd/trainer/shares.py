"""Each instance's share of a loss, as cotangents where the loss is cut: how large is it, and what does it descend?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_jd.trainer.cotangents import Cotangent, surrogates


class Piece(NamedTuple):
    """A place where a loss is cut.

    Attributes:
        cotangent: The tensor, and the gradient of the loss there.
        owner: The instance of each of its leading rows [N], or tokens [N, T]; -1 for none. A loss of the whole batch
            [] is owned by instance 0.
        name: The position of its loss among the losses.
    """

    cotangent: Cotangent
    owner: Tensor
    name: int


class Values(NamedTuple):
    """What B instances lose, without a graph.

    Attributes:
        sums: [B, K] float64, the sum of an instance's losses.
        counts: [B, K] int64, how many losses (of tokens, instances or batches) that is.
        parts: [B, K] float64, the instance's part of Trainer's loss.
    """

    sums: Tensor
    counts: Tensor
    parts: Tensor


class Shares:
    """The shares of B instances in K losses; those that aren't finite are taken out.

    Args:
        pieces: Where the losses are cut.
        instances: B.
        names: K.
        rest: [] what of the loss goes past the pieces, with a graph; None: there is nothing.
        values: What the instances lose, if it is known.
        normalised: Whether the shares are those of Trainer's loss; else they are of plain sums of losses.
        factor: What the cotangents still have to be multiplied by.
        unreduced: Whether the loss is cut at unreduced losses, whose own graph may hold what isn't finite.

    Attributes:
        sizes: [B, K] float64, the norms of the instances' cotangents, summed over places.
        counts: [B, K] int64, how many losses each share is of, or at how many places the loss depends on the instance.
        finite: [B, K] (bool).
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        instances: int,
        names: int = 1,
        rest: Tensor | None = None,
        values: Values | None = None,
        normalised: bool = True,
        factor: Tensor | float = 1.0,
        unreduced: bool = False,
    ):
        self.pieces, self.instances, self.names, self.rest = list(pieces), instances, names, rest
        self.values, self.normalised, self.factor, self.unreduced = values, normalised, factor, unreduced
        self.sizes, places = self._measured()
        self.finite = self.sizes.isfinite()
        if values is not None:
            self.finite = self.finite & values.sums.isfinite()
        counts = places if values is None else values.counts
        self.counts = counts * self.finite
        if not self.finite.all():
            self._keep(self.finite)
            # What counts nothing has been divided by 0.
            self.finite = self.finite | (counts == 0)

    @property
    def some(self) -> Tensor:
        """[B, K] (bool) which shares there are."""
        return self.counts > 0

    def take_out(self, instances: Tensor) -> None:
        """Leaves instances [B] (bool) out of all losses, as if nothing of them counted."""
        self.counts = self.counts * ~instances[:, None]
        self._keep(~instances[:, None].expand_as(self.finite))

    def drop_broken_losses(self) -> int:
        """Leaves losses of the whole batch out where they aren't finite, as if they were none; returns how many."""
        broken = [p for p in self.pieces if not p.owner.ndim and not self.finite[0, p.name]]
        self.pieces = [piece for piece in self.pieces if all(piece is not other for other in broken)]
        for piece in broken:
            self.finite[0, piece.name] = True
        return len(broken)

    def surrogates(self, segments: Tensor, objectives: int) -> Tensor:
        """s [S K], whose gradients are those of the objectives' shares, the first loss's first; the values are 0.

        Args:
            segments: [B] the segment of each instance; -1 for none.
            objectives: S.
        """
        columns: list[list[Tensor]] = [[] for _ in range(self.names)]
        for cotangent, owner, name in self.pieces:
            columns[name].append(surrogates(cotangent, at(segments, owner), objectives))
        none = torch.zeros(objectives, device=segments.device)
        found = torch.cat([torch.stack(parts).sum(0) if parts else none for parts in columns])
        return found * self.factor.to(found) if isinstance(self.factor, Tensor) else found * self.factor

    def weighted(self, weights: Tensor) -> Tensor:
        """[] whose gradient is that of the sum of all shares, each times its weight [B, K]; the value is 0."""
        each = self.surrogates(torch.arange(self.instances, device=weights.device), self.instances)
        return (each * weights.T.flatten().to(each)).sum()

    def release(self) -> None:
        """Lets the graph go."""
        self.pieces, self.rest = [], None

    def like(self, first: Shares, kept: Tensor | None) -> None:
        """Scales the shares as those of the first pass are, whose instances were kept [B] (bool)."""
        sizes = first.sizes if kept is None else first.sizes[kept]
        scale = sizes.sum() / self.sizes.sum()
        if scale.isfinite():
            self.factor = first.factor * scale

    def _keep(self, kept: Tensor) -> None:
        """Makes the cotangents of all others zero: in a backward, NaN times 0 is NaN."""
        self.sizes = self.sizes.masked_fill(~kept, 0)
        self.pieces = [_where(piece, kept[:, piece.name]) for piece in self.pieces]

    def _measured(self) -> tuple[Tensor, Tensor]:
        """How large each instance's cotangents are [B, K], and at how many places the loss depends on it [B, K]."""
        device = self.pieces[0].owner.device
        sizes = torch.zeros(self.instances, self.names, dtype=torch.float64, device=device)
        counts = torch.zeros_like(sizes, dtype=torch.int64)
        for cotangent, owner, name in self.pieces:
            places = _sizes(cotangent.gradient, owner)
            where = owner.view(owner.shape + (1,) * (places.dim() - owner.dim())).expand_as(places)
            mine = where >= 0
            sizes[:, name].index_add_(0, where[mine], places[mine].double())
            counts[:, name].index_add_(0, where[mine], (places[mine] != 0).long())
        return sizes, counts


def sums_of(
    losses: Sequence[Tensor], counted: Sequence[Tensor], owners: Sequence[Tensor], instances: int
) -> tuple[Tensor, Tensor]:
    """Adds up K unreduced losses by instance.

    Args:
        losses: [N], [N, T] or [] each.
        counted: Which of them count (bool), the same shapes.
        owners: See `Piece`.
        instances: B.

    Returns:
        The sums [B, K], float64, and how many losses they are of [B, K].
    """
    device = owners[0].device
    sums = torch.zeros(instances, len(losses), dtype=torch.float64, device=device)
    counts = torch.zeros_like(sums, dtype=torch.int64)
    for k, (values, mask, owner) in enumerate(zip(losses, counted, owners, strict=True)):
        where = owner.view(owner.shape + (1,) * (values.dim() - owner.dim())).expand_as(values)
        mine = mask.to(device) & (where >= 0)
        sums[:, k].index_add_(0, where[mine], values.detach().to(device)[mine].double())
        counts[:, k].index_add_(0, where[mine], torch.ones_like(where[mine]))
    return sums, counts


def at(ids: Tensor, owner: Tensor) -> Tensor:
    """The objective of each leading row or token, from that of each instance; -1 for none."""
    return torch.where(owner >= 0, ids[owner.clamp(min=0)], -1)


def _sizes(gradient: Tensor, owner: Tensor) -> Tensor:
    """How large the cotangent is at each place: of the dimensions of `owner`, and one more where that holds tokens."""
    dims = tuple(range(max(owner.dim(), min(gradient.dim() - 1, 2)), gradient.dim()))
    if not dims:
        return gradient.abs()
    return torch.linalg.vector_norm(gradient, dim=dims, dtype=torch.promote_types(gradient.dtype, torch.float32))


def _where(piece: Piece, kept: Tensor) -> Piece:
    """The piece with zeros where its instance is not kept."""
    gradient = piece.cotangent.gradient
    mask = kept[piece.owner.clamp(min=0)]
    mask = mask.view(mask.shape + (1,) * (gradient.dim() - mask.dim()))
    return piece._replace(cotangent=piece.cotangent._replace(gradient=torch.where(mask, gradient, 0)))

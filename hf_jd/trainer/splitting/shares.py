"""Each instance's share of a loss, as cotangents where the loss is cut: its size, and its surrogate loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_jd.objectives import Membership
from hf_jd.trainer.splitting.cotangents import Cotangent, surrogates, wide


class Piece(NamedTuple):
    """A place where a loss is cut.

    Attributes:
        cotangent: The tensor, and the gradient of the loss with respect to it.
        owner: The instance of each leading row [N], or token [N, T]; -1 for none. A loss of the whole batch [] belongs
            to instance 0.
        name: The index of its loss among the losses.
    """

    cotangent: Cotangent
    owner: Tensor
    name: int


class Values(NamedTuple):
    """The losses of B instances, without a graph.

    Attributes:
        sums: [B, K] float64, the sum of an instance's losses.
        counts: [B, K] int64, the number of these losses (of tokens, instances or batches).
        parts: [B, K] float64, the instance's part of Trainer's loss.
    """

    sums: Tensor
    counts: Tensor
    parts: Tensor


class Shares:
    """The shares of B instances in K losses; shares that aren't finite are removed.

    Args:
        pieces: Where the losses are cut.
        instances: B.
        names: K.
        rest: [] the part of the loss that bypasses the pieces, with a graph; None if there is none.
        values: The instances' losses, if known.
        normalised: Whether these are shares of Trainer's loss, not of plain sums of losses.
        factor: A factor still to apply to the cotangents.
        unreduced: Whether the loss is cut at unreduced losses, whose own graph may not be finite.
        in_parts: Whether the model was called on parts of the batch.

    Attributes:
        sizes: [B, K] float64, the norms of the instances' cotangents, summed over places.
        counts: [B, K] int64, the number of losses in each share, or of places where the loss depends on the instance.
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
        in_parts: bool = False,
    ):
        self.pieces, self.instances, self.names, self.rest = list(pieces), instances, names, rest
        self.values, self.normalised, self.factor, self.unreduced = values, normalised, factor, unreduced
        self.in_parts = in_parts
        measured = [(_sizes(c.gradient, owner), owner, name) for c, owner, name in self.pieces]
        self.sizes, places = sums_of([(s, s != 0, owner, name) for s, owner, name in measured], instances, names)
        self.finite = self.sizes.isfinite()
        if values is not None:
            self.finite = self.finite & values.sums.isfinite()
        counts = places if values is None else values.counts
        self.counts = counts * self.finite
        if not self.finite.all():
            self._keep(self.finite)
            # Losses without a count have been divided by 0.
            self.finite = self.finite | (counts == 0)

    @property
    def some(self) -> Tensor:
        """The shares that aren't empty, [B, K] (bool)."""
        return self.counts > 0

    def take_out(self, instances: Tensor) -> None:
        """Remove instances [B] (bool) from all losses, as if they had no tokens that count."""
        self.counts = self.counts * ~instances[:, None]
        self._keep(~instances[:, None].expand_as(self.finite))

    def drop_broken_losses(self) -> int:
        """Remove losses of the whole batch that aren't finite; return their number."""
        broken = [p for p in self.pieces if not p.owner.ndim and not self.finite[0, p.name]]
        self.pieces = [piece for piece in self.pieces if all(piece is not other for other in broken)]
        for piece in broken:
            self.finite[0, piece.name] = True
        return len(broken)

    def parts(self) -> list[list[Piece]]:
        """Group the pieces by the instances that they belong to."""
        groups: dict[tuple[int, ...], list[Piece]] = {}
        for piece in self.pieces:
            groups.setdefault(tuple(piece.owner.tolist()), []).append(piece)
        return list(groups.values())

    def surrogates(self, segments: Tensor, objectives: int, pieces: Sequence[Piece] | None = None) -> Tensor:
        """Return s [S K], with the gradients of the objectives' shares, the first loss's first; the values are 0.

        Args:
            segments: [B] the segment of each instance; -1 for none.
            objectives: S.
            pieces: Some of the pieces; by default, all.
        """
        columns: list[list[Tensor]] = [[] for _ in range(self.names)]
        for cotangent, owner, name in self.pieces if pieces is None else pieces:
            columns[name].append(surrogates(cotangent, at(segments, owner), objectives))
        none = torch.zeros(objectives, device=segments.device)
        sums = torch.cat([torch.stack(parts).sum(0) if parts else none for parts in columns])
        return sums * self.factor.to(sums) if isinstance(self.factor, Tensor) else sums * self.factor

    def weighted(self, weights: Tensor, members: Membership, rest: bool) -> Tensor:
        """Return a scalar whose gradient is the weighted sum of the objectives.

        Args:
            weights: [m], one per objective; the last one is the rest's if that is an objective.
            members: The objectives of the instances.
            rest: Whether to include the rest, unless it is an objective.
        """
        m = len(members.groups)
        each = self.surrogates(members.segments, m // self.names)
        total = (each * weights[:m].to(each)).sum()
        if self.rest is None:
            return total
        if len(weights) > m:
            return total + weights[-1].to(self.rest) * self.rest
        return total + self.rest if rest else total

    def release(self) -> None:
        """Free the graph."""
        self.pieces, self.rest = [], None

    def like(self, first: Shares, keep: Tensor | None) -> None:
        """Scale the shares like those of the first pass, restricted to the instances `keep` [B] (bool)."""
        sizes = first.sizes if keep is None else first.sizes[keep]
        scale = sizes.sum() / self.sizes.sum()
        if scale.isfinite():
            self.factor = first.factor * scale

    def _keep(self, keep: Tensor) -> None:
        """Zero the cotangents of all other shares: in a backward, NaN times 0 is NaN."""
        self.sizes = self.sizes.masked_fill(~keep, 0)
        self.pieces = [_where(piece, keep[:, piece.name]) for piece in self.pieces]


def sums_of(parts: Sequence[tuple[Tensor, Tensor, Tensor, int]], instances: int, names: int) -> tuple[Tensor, Tensor]:
    """Add up the values of K losses by instance.

    Args:
        parts: Values [N], [N, T] or [], which of them count (bool), and their owner and name; see `Piece`.
        instances: B.
        names: K.

    Returns:
        The sums [B, K], float64, and the numbers of values that count [B, K].
    """
    device = parts[0][2].device
    sums = torch.zeros(instances, names, dtype=torch.float64, device=device)
    counts = torch.zeros_like(sums, dtype=torch.int64)
    for values, counted, owner, name in parts:
        where = wide(owner, values).expand_as(values)
        used = counted.to(device) & (where >= 0)
        sums[:, name].index_add_(0, where[used], values.detach().to(device)[used].double())
        counts[:, name].index_add_(0, where[used], torch.ones_like(where[used]))
    return sums, counts


def at(ids: Tensor, owner: Tensor) -> Tensor:
    """Return the objective of each leading row or token, from each instance's; -1 for none."""
    return torch.where(owner >= 0, ids[owner.clamp(min=0)], -1)


def _sizes(gradient: Tensor, owner: Tensor) -> Tensor:
    """Return the norms of the cotangent, over all but the dimensions of `owner` and, if that has only rows, tokens."""
    dims = tuple(range(max(owner.dim(), min(gradient.dim() - 1, 2)), gradient.dim()))
    if not dims:
        return gradient.abs()
    return torch.linalg.vector_norm(gradient, dim=dims, dtype=torch.promote_types(gradient.dtype, torch.float32))


def _where(piece: Piece, keep: Tensor) -> Piece:
    """Return the piece with zeros for instances not in `keep`."""
    gradient = piece.cotangent.gradient
    mask = wide(keep[piece.owner.clamp(min=0)], gradient)
    return piece._replace(cotangent=piece.cotangent._replace(gradient=torch.where(mask, gradient, 0)))

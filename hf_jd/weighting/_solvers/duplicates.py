"""Merge rows of the same direction: a duplicate example makes the Gramian singular, but this fixes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SAME = 1e-13  # rows have the same direction if their cosine is at least 1 minus this


class Directions(NamedTuple):
    """The c distinct directions of m rows.

    Attributes:
        first: The first row of each direction, [c].
        of_row: Each row's direction, [m].
    """

    first: Tensor
    of_row: Tensor

    @classmethod
    def of(cls, cosines: Tensor) -> Directions:
        """Find the directions of the rows with these cosines, [m, m]."""
        same = (cosines >= 1 - _SAME).to(torch.int8)
        first, of_row = same.argmax(dim=1).unique(return_inverse=True)
        return cls(first, of_row)

    def gather(self, values: Tensor) -> Tensor:
        """Sum values of rows [k, m] into values of directions [k, c]."""
        return values.new_zeros(len(values), len(self.first)).index_add_(1, self.of_row, values)

    def spread(self, corrections: Tensor, targets: Tensor) -> Tensor:
        """Split each direction's correction among its rows so that |u + z| is smallest, raising the smallest u first.

        Args:
            corrections: One per direction, [k, c], 0 or more.
            targets: u, one per row, [k, m].

        Returns:
            z, [k, m].
        """
        shares = corrections[:, self.of_row]
        for direction in (self.of_row.bincount() > 1).nonzero()[:, 0].tolist():
            rows = (self.of_row == direction).nonzero()[:, 0]
            ordered = targets[:, rows].sort(dim=1, descending=True).values
            # If the j largest u stay as they are, the rest rise to one level: the right j gives the lowest level.
            unchanged = torch.cat([ordered.new_zeros(len(ordered), 1), ordered.cumsum(dim=1)[:, :-1]], dim=1)
            total = corrections[:, direction, None] + ordered.sum(dim=1, keepdim=True)
            raised = torch.arange(len(rows), 0, -1, device=ordered.device)
            level = ((total - unchanged) / raised).amin(dim=1, keepdim=True)
            shares[:, rows] = (level - targets[:, rows]).clamp(min=0)
        return shares

"""Rows of one direction taken as one: a batch that holds an example twice has a singular Gramian, but an easy one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SAME = 1e-13  # below 1, a cosine


class Directions(NamedTuple):
    """The different directions of m rows.

    Attributes:
        first: The first row of each direction, [c].
        of_row: Each row's direction, [m].
    """

    first: Tensor
    of_row: Tensor

    @classmethod
    def of(cls, cosines: Tensor) -> Directions:
        """Finds the directions of the rows with these cosines, [m, m]."""
        same = (cosines >= 1 - _SAME).to(torch.int8)
        first, of_row = same.argmax(dim=1).unique(return_inverse=True)
        return cls(first, of_row)

    def gather(self, values: Tensor) -> Tensor:
        """Sums values of rows [k, m] to values of directions [k, c]."""
        return values.new_zeros(len(values), len(self.first)).index_add_(1, self.of_row, values)

    def spread(self, corrections: Tensor, targets: Tensor) -> Tensor:
        """Shares each direction's correction among its rows, so that |u + z| is smallest: first to the least.

        Args:
            corrections: Of the directions, [k, c], 0 or more.
            targets: u, of the rows, [k, m].

        Returns:
            z, [k, m].
        """
        shares = corrections[:, self.of_row]
        for direction in (self.of_row.bincount() > 1).nonzero()[:, 0].tolist():
            rows = (self.of_row == direction).nonzero()[:, 0]
            own = targets[:, rows].sort(dim=1, descending=True).values
            # The least are raised to one level, the lowest of those that result if the j largest stay as they are.
            kept = torch.cat([own.new_zeros(len(own), 1), own.cumsum(dim=1)[:, :-1]], dim=1)
            total = corrections[:, direction, None] + own.sum(dim=1, keepdim=True)
            level = ((total - kept) / torch.arange(len(rows), 0, -1, device=own.device)).amin(dim=1, keepdim=True)
            shares[:, rows] = (level - targets[:, rows]).clamp(min=0)
        return shares

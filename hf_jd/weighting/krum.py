"""Krum: the row nearest to most others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_jd.weighting.base import Names, Weighting


@dataclass(frozen=True)
class KrumWeighting(Weighting):
    """Byzantine-tolerant selection of rows, where some objectives may be corrupt.

    Row i's score is the sum of its squared distances to its m - f - 2 nearest other rows. The update is the row with
    the lowest score, or (Multi-Krum) the mean of the `n_selected` lowest; ties go to the first row.

    Attributes:
        n_byzantine: f, the number of rows that may be corrupt; m >= f + 3 is needed.
        n_selected: The number of rows to average, at most m.

    References:
        Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
        section 4.
    """

    guarantee: ClassVar[str] = "robust to `n_byzantine` corrupt rows"
    cost: ClassVar[str] = "m²"

    n_byzantine: int = 1
    n_selected: int = 1

    def __post_init__(self) -> None:
        if self.n_byzantine < 0 or self.n_selected < 1:
            raise ValueError(
                f"Krum needs n_byzantine >= 0 and n_selected >= 1; they are {self.n_byzantine} and {self.n_selected}."
            )

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Return 1 / n_selected for the selected rows, 0 for the others, [m]."""
        m = len(gramian)
        if m < max(self.n_byzantine + 3, self.n_selected):
            raise ValueError(
                f"Krum with n_byzantine={self.n_byzantine} and n_selected={self.n_selected} needs at least "
                f"{max(self.n_byzantine + 3, self.n_selected)} objectives (n_byzantine + 3, and n_selected); this step "
                f"has {m}."
            )
        squares = gramian.diagonal()
        distances = (squares + squares[:, None] - 2 * gramian).clamp(min=0).fill_diagonal_(0)
        # Every row's nearest row is itself, at 0.
        scores = distances.topk(m - self.n_byzantine - 1, dim=1, largest=False, sorted=False).values.sum(dim=1)
        selected = scores.argsort(stable=True)[: self.n_selected]
        return gramian.new_zeros(m).index_fill_(0, selected, 1 / self.n_selected)

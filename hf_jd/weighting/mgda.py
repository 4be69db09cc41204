"""MGDA: the shortest vector in the convex hull of the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_jd.weighting._solvers.cosines import cosine_matrix
from hf_jd.weighting._solvers.minimum_norm import minimum_norm_weights
from hf_jd.weighting.base import Names
from hf_jd.weighting.preference import PreferenceWeighting, checked_numbers


@dataclass(frozen=True)
class MGDAWeighting(PreferenceWeighting):
    """Multiple-gradient descent algorithm, solved exactly.

    The update is the shortest convex combination d of the rows; <g_i, d> >= |d|^2 for every row, and d = 0 exactly if
    the step is Pareto stationary. Short rows dominate, however long the others are.

    Attributes:
        pref_vector: Positive p: rows are divided by m p_i first, so that <g_i, d> is proportional to p_i for the
            objectives of positive weight. None leaves rows as they are.

    References:
        Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", C. R. Acad. Sci. Paris
        350 (2012), section 2; the scales S_i there are our preferences.
    """

    guarantee: ClassVar[str] = "non-conflicting; 0 where Pareto stationary"
    cost: ClassVar[str] = "a few times m³"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pref_vector is not None:
            checked_numbers("pref_vector", self.pref_vector, positive=True)

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Compute w = lambda / (m p), lambda = argmin |sum_i lambda_i g_i / (m p_i)| on the simplex, [m]."""
        scale = self.preference(gramian) * len(gramian)
        lengths = gramian.diagonal().sqrt()
        zero = lengths == 0
        if zero.any():  # 0 is in the hull: all the weight is on the zero rows
            return zero / zero.sum() / scale
        scaled = lengths / scale
        offsets = scaled.min() / scaled
        cosines = cosine_matrix(gramian, lengths)
        multiples = minimum_norm_weights(cosines.cpu().numpy(), offsets.cpu().numpy())
        return torch.from_numpy(multiples).to(offsets) * offsets / scale

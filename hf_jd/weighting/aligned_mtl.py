"""Aligned-MTL: scales the rows' principal components to equal length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from hf_jd.weighting.base import Names
from hf_jd.weighting.preference import PreferenceWeighting

ScaleMode = Literal["min", "median", "rmse"]


@dataclass(frozen=True)
class AlignedMTLWeighting(PreferenceWeighting):
    """Independent component alignment: replaces the Jacobian with the nearest one of condition number 1.

    With G = V diag(lambda) V^T, of rank r, the weights are w = sigma V_r diag(lambda_r)^(-1/2) V_r^T p.

    Attributes:
        scale_mode: How long the aligned components are, sigma: as long as the shortest ("min", as in the paper), as the
            median ("median"; of an even number, the lower one), or the root mean square of all ("rmse").

    References:
        Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023, algorithm 1.
    """

    guarantee: ClassVar[str] = "condition number 1"
    cost: ClassVar[str] = "m³"

    scale_mode: ScaleMode = "min"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_mode not in get_args(ScaleMode):
            raise ValueError(f"scale_mode is {self.scale_mode!r}; choose one of {', '.join(get_args(ScaleMode))}.")

    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Compute w = sigma (G^+)^(1/2) p, [m]; p itself where all rows are zero."""
        preference = self.preference(gramian)
        values, vectors = torch.linalg.eigh(gramian)
        noise = torch.maximum(-values[0], values[-1] * len(values) * torch.finfo(values.dtype).eps)
        significant = values > noise
        if not significant.any():
            return preference
        values, vectors = values[significant], vectors[:, significant]
        scale = {"min": torch.amin, "median": torch.median, "rmse": torch.mean}[self.scale_mode](values)
        return (vectors * (scale / values).sqrt()) @ (vectors.mT @ preference)

"""Preference vectors: how much of each objective is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_jd.weighting.base import Weighting


@dataclass(frozen=True)
class PreferenceWeighting(Weighting):
    """A weighting that takes a preference vector.

    Attributes:
        pref_vector: How much of each objective is wanted, [m], non-negative and not all zero: a tensor or numbers
            (stored as a tuple of floats). Its sum matters, too; None means 1/m each.
    """

    pref_vector: Sequence[float] | Tensor | None = None

    def __post_init__(self) -> None:
        if self.pref_vector is not None:
            object.__setattr__(self, "pref_vector", checked_numbers("pref_vector", self.pref_vector))

    def preference(self, gramian: Tensor) -> Tensor:
        """Return the preferences [m] for a Gramian [m, m], on its device; raise a `ValueError` if there aren't m."""
        m = len(gramian)
        if self.pref_vector is None:
            return gramian.new_full((m,), 1 / m)
        if len(self.pref_vector) != m:
            raise ValueError(
                f"pref_vector has {len(self.pref_vector)} entries, but this step has {m} objectives. Preferences need "
                f"the same number of objectives at every step."
            )
        return torch.as_tensor(self.pref_vector, dtype=gramian.dtype, device=gramian.device)


def checked_numbers(name: str, values: Sequence[float] | Tensor, positive: bool = False) -> tuple[float, ...]:
    """Return the values as a tuple of floats; raise a `ValueError` if one is negative (or zero, if `positive`)."""
    numbers = values.detach().cpu().flatten().tolist() if isinstance(values, Tensor) else [float(v) for v in values]
    if isinstance(values, Tensor) and values.ndim != 1:
        raise ValueError(f"{name} has one dimension; this one has the shape {list(values.shape)}.")
    if not all(math.isfinite(v) and v >= 0 for v in numbers) or not any(numbers):
        raise ValueError(f"{name} has to hold finite non-negative numbers, not all zero; it is {numbers}.")
    if positive and not all(numbers):
        raise ValueError(f"{name} has to hold positive numbers; it is {numbers}.")
    return tuple(numbers)


def per_objective(name: str, values: Sequence[float] | Tensor | None, like: Tensor, default: float) -> Tensor:
    """Return the user's values as a tensor [m], filled with the default for None; raise a `ValueError` if not m."""
    m = len(like)
    if values is None:
        return like.new_full((m,), default)
    if len(values) != m:
        raise ValueError(f"{name} has {len(values)} entries, but this step has {m} objectives.")
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)


def log_losses(method: str, losses: Tensor) -> Tensor:
    """Return log L, [m], with losses clamped to 1e-12 of the largest; raise a `ValueError` if one is negative."""
    if (losses < 0).any():
        raise ValueError(f"{method} needs losses of 0 or more; they are {losses.tolist()}.")
    largest = losses.max()
    return (losses / largest).clamp(min=1e-12).log() + largest.log() if largest > 0 else torch.zeros_like(losses)

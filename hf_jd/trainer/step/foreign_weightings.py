"""Accept any callable G -> w as a weighting, including TorchJD's objects, and check its weights."""

from __future__ import annotations

import functools
import reprlib
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_jd.weighting import WEIGHTINGS

# TorchJD's weightings of a Jacobian that read only its number of rows, which is the same for the Gramian.
_READ_THE_NUMBER_OF_ROWS = {"MeanWeighting", "SumWeighting", "ConstantWeighting", "RandomWeighting"}


def as_weighting(weighting: Any) -> Callable[[Tensor], Tensor]:
    """Return the callable that weighs a Gramian, from the user's `weighting`.

    This is the object itself, except for TorchJD's aggregators, which take a Jacobian [m, n] and return [n]: if one
    weighs by the Gramian, its inner weighting is used, which gives the same update.

    Raises:
        ValueError: It isn't callable, is a class, or takes a Jacobian.
    """
    if isinstance(weighting, type) or not callable(weighting):
        what = f"the class `{weighting.__name__}`" if isinstance(weighting, type) else f"{reprlib.repr(weighting)}"
        raise ValueError(
            f"`weighting` is {what}, but has to be an object that takes a Gramian [m, m] and returns weights [m], such "
            "as `UPGradWeighting()`; to choose one by name, leave `weighting` out and use --jd_weighting."
        )
    inner = _called(weighting)
    bases = {base.__name__: base for base in type(inner).__mro__ if base.__module__.partition(".")[0] == "torchjd"}
    if "Aggregator" in bases:
        weighted = bases.get("WeightedAggregator")
        # A subclass with another `forward` does more than weigh.
        weighs = weighted is not None and type(inner).forward is weighted.forward
        if not weighs or not _is_of_gramian(inner.weighting):
            raise _takes_a_jacobian(inner, "aggregator")
        return inner.weighting.weighting
    if "Weighting" in bases and _is_of_gramian(inner):
        return inner.weighting
    if "_MatrixWeighting" in bases and not _READ_THE_NUMBER_OF_ROWS & bases.keys():
        raise _takes_a_jacobian(inner, "weighting")
    return weighting


def _called(function: Any) -> Any:
    """Return the object behind a partial, or behind a method that only calls it."""
    inner = function.func if isinstance(function, functools.partial) else function
    calls = isinstance(inner, types.MethodType) and inner.__name__ in ("forward", "__call__")
    return inner.__self__ if calls else inner


def _is_of_gramian(weighting: Any) -> bool:
    """Return whether a weighting of a Jacobian computes the Gramian and weighs that."""
    return getattr(getattr(weighting, "fn", None), "__name__", "") == "compute_gramian"


def _takes_a_jacobian(foreign: Any, kind: str) -> ValueError:
    name = type(foreign).__name__
    wanted = name.removesuffix("Weighting") + "Weighting"
    matching = {cls.__name__: key for key, cls in WEIGHTINGS.items()}
    if wanted in matching:
        advice = f"give `hf_jd.weighting.{wanted}`, or leave `weighting` out and use --jd_weighting {matching[wanted]}"
    else:
        advice = f"no weighting matches it; leave `weighting` out, and choose a --jd_weighting: {', '.join(WEIGHTINGS)}"
    return ValueError(
        f"`weighting` is TorchJD's {kind} `{name}`, which takes a Jacobian [m, n], but a weighting takes its Gramian "
        f"[m, m]: {advice}."
    )


def checked_weights(weighting: Any, weights: Any, m: int) -> Tensor:
    """Check the weights that a weighting returned, and convert NumPy arrays to tensors [m].

    Raises:
        ValueError: They are not m finite real numbers.
    """
    tensor = weights
    if isinstance(weights, np.ndarray) and weights.dtype.kind in "biuf":
        tensor = torch.from_numpy(np.array(weights, dtype=np.float64))  # copied, as it may be read-only or a view
    is_vector = isinstance(tensor, Tensor) and tensor.shape == (m,)
    if not is_vector or tensor.is_complex() or tensor.layout is not torch.strided or not tensor.isfinite().all():
        name = getattr(weighting, "__name__", type(weighting).__name__)
        raise ValueError(
            f"The weighting `{name}` has to return {m} finite weights [{m}] for a Gramian [{m}, {m}]; it returned "
            f"{_described(weights)}."
        )
    return tensor


def _described(value: Any) -> str:
    if not isinstance(value, Tensor | np.ndarray):
        return f"{reprlib.repr(value)} ({type(value).__name__})"
    kind, numbers = ("a tensor", value.to_dense()) if isinstance(value, Tensor) else ("a NumPy array", value)
    return f"{kind} of shape {list(value.shape)} and dtype {value.dtype}: {reprlib.repr(numbers.tolist())}"

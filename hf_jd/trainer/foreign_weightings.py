"""Any callable G -> w as the weighting, TorchJD's objects among them: what is taken, and what it may return."""

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

# TorchJD's weightings of a Jacobian that read no more of it than its number of rows, which the Gramian has too.
_READ_THE_NUMBER_OF_ROWS = {"MeanWeighting", "SumWeighting", "ConstantWeighting", "RandomWeighting"}


def as_weighting(given: Any) -> Callable[[Tensor], Tensor]:
    """Returns what weighs a Gramian in what a user handed over as the weighting.

    That is the object itself, but for TorchJD's aggregators, which take a Jacobian [m, n] and return [n]: where one
    weighs by the Gramian, its own weighting takes its place, which gives the same update.

    Raises:
        ValueError: It isn't callable, is a class, or takes a Jacobian.
    """
    if isinstance(given, type) or not callable(given):
        what = f"the class `{given.__name__}`" if isinstance(given, type) else f"{reprlib.repr(given)}"
        raise ValueError(
            f"`weighting` is {what}, and has to be an object that is called with a Gramian [m, m] and returns weights "
            "[m], such as `UPGradWeighting()`; for one by its name, leave `weighting` out and use --jd_weighting."
        )
    inner = _called(given)
    bases = {base.__name__: base for base in type(inner).__mro__ if base.__module__.partition(".")[0] == "torchjd"}
    if "Aggregator" in bases:
        weighted = bases.get("WeightedAggregator")
        # A subclass with another `forward` does more than to weigh.
        weighs = weighted is not None and type(inner).forward is weighted.forward
        if not weighs or not _is_of_gramian(inner.weighting):
            raise _takes_a_jacobian(inner, "aggregator")
        return inner.weighting.weighting
    if "Weighting" in bases and _is_of_gramian(inner):
        return inner.weighting
    if "_MatrixWeighting" in bases and not _READ_THE_NUMBER_OF_ROWS & bases.keys():
        raise _takes_a_jacobian(inner, "weighting")
    return given


def _called(given: Any) -> Any:
    """The object behind a partial, or behind a method that only calls it."""
    inner = given.func if isinstance(given, functools.partial) else given
    calls = isinstance(inner, types.MethodType) and inner.__name__ in ("forward", "__call__")
    return inner.__self__ if calls else inner


def _is_of_gramian(weighting: Any) -> bool:
    """Whether it composes a weighting of the Gramian with the Gramian of a Jacobian."""
    return getattr(getattr(weighting, "fn", None), "__name__", "") == "compute_gramian"


def _takes_a_jacobian(given: Any, kind: str) -> ValueError:
    name = type(given).__name__
    wanted = name.removesuffix("Weighting") + "Weighting"
    matching = {cls.__name__: key for key, cls in WEIGHTINGS.items()}
    if wanted in matching:
        advice = f"give `hf_jd.weighting.{wanted}`, or leave `weighting` out and use --jd_weighting {matching[wanted]}"
    else:
        advice = (
            f"no weighting is the same; leave `weighting` out, and choose a --jd_weighting: {', '.join(WEIGHTINGS)}"
        )
    return ValueError(
        f"`weighting` is TorchJD's {kind} `{name}`, which takes a Jacobian [m, n], and a weighting takes its Gramian "
        f"[m, m]: {advice}."
    )


def checked_weights(weighting: Any, weights: Any, m: int) -> Tensor:
    """Returns the weights [m] that a weighting returned as a tensor [m]; arrays of NumPy are taken, too.

    Raises:
        ValueError: They are something else than m finite real numbers.
    """
    found = weights
    if isinstance(weights, np.ndarray) and weights.dtype.kind in "biuf":
        found = torch.from_numpy(np.array(weights, dtype=np.float64))  # A copy: it may be read-only, or a view.
    right = (
        isinstance(found, Tensor) and found.shape == (m,) and not found.is_complex() and found.layout is torch.strided
    )
    if not right or not found.isfinite().all():
        name = getattr(weighting, "__name__", type(weighting).__name__)
        raise ValueError(
            f"The weighting `{name}` has to return {m} finite weights [{m}] for a Gramian [{m}, {m}]; it returned "
            f"{_described(weights)}."
        )
    return found


def _described(value: Any) -> str:
    if not isinstance(value, Tensor | np.ndarray):
        return f"{reprlib.repr(value)} ({type(value).__name__})"
    kind, numbers = ("a tensor", value.to_dense()) if isinstance(value, Tensor) else ("an array of NumPy", value)
    return f"{kind} of shape {list(value.shape)} and dtype {value.dtype}: {reprlib.repr(numbers.tolist())}"

"""The interface of a weighting: a callable from a Gramian, or from losses, to weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

Names = Sequence[Any]
"""The objectives' names at one step: m different hashable values, in the order of the Gramian's rows."""


class Weighting(ABC):
    """A map from the Gramian G = J J^T of a step to the weights w of its objectives; the update is J^T w.

    Call it as `weights = weighting(gramian)`: `gramian` [m, m], symmetric and positive semi-definite, of any floating
    dtype, on any device; `weights` [m], of the same dtype and device, without a graph. Weights are computed in float64.
    An invalid Gramian raises a `ValueError` that says what is wrong with it.

    The trainer only needs a callable G -> w, so any function or TorchJD object will do. Subclasses of this class add:

    * `weighting.reads` is `"gramian"` or `"losses"`. One that reads losses (`LossWeighting`) is called with the step's
      losses [m] instead, so no Gramian has to be computed.
    * `weighting(gramian, names=names)` says which objective each row belongs to, for weightings that remember past
      steps (`Stateful`): groups may be absent from a batch, or come in another order. Without names, row i is objective
      i. Weightings without memory ignore `names`.
    * A `Stateful` weighting has `state_dict()`, `load_state_dict(state)` and `reset()`.

    A subclass defines `weigh`, which receives only valid float64 Gramians. `guarantee` (what is proved about the
    update) and `cost` (of the weights, in addition to the Gramian) are shown in the documents.
    """

    guarantee: ClassVar[str] = ""
    cost: ClassVar[str] = ""

    @property
    def reads(self) -> Literal["gramian", "losses"]:
        """The input that this weighting takes."""
        return "gramian"

    def __call__(self, gramian: Tensor, /, *, names: Names | None = None) -> Tensor:
        """Compute the weights [m] from the Gramian [m, m]; see the class."""
        with torch.no_grad():
            weights = self.weigh(checked_gramian(gramian), checked_names(names, len(gramian)))
        return weights.to(gramian)

    @abstractmethod
    def weigh(self, gramian: Tensor, names: Names, /) -> Tensor:
        """Compute the weights [m], float64, from a valid float64 Gramian [m, m]."""


class LossWeighting(Weighting):
    """A map from the losses of a step to weights, without a Gramian.

    Call it as `weights = weighting(losses)`: `losses` [m], finite, of any floating dtype. The weights multiply the
    losses; like all weights, they are constants in the backward pass.
    """

    @property
    def reads(self) -> Literal["gramian", "losses"]:
        """The input that this weighting takes."""
        return "losses"

    def __call__(self, losses: Tensor, /, *, names: Names | None = None) -> Tensor:
        """Compute the weights [m] from the losses [m]; see the class."""
        with torch.no_grad():
            weights = self.weigh(checked_losses(losses), checked_names(names, len(losses)))
        return weights.to(losses)

    @abstractmethod
    def weigh(self, losses: Tensor, names: Names, /) -> Tensor:
        """Compute the weights [m], float64, from valid float64 losses [m]."""


class GeneralizedWeighting(ABC):
    """A map from a generalized Gramian [m1, ..., mk, mk, ..., m1] to weights [m1, ..., mk], one per loss."""

    @abstractmethod
    def __call__(self, gramian: Tensor, /) -> Tensor:
        """Compute the weights [m1, ..., mk]; same dtype and device as the generalized Gramian."""


@dataclass(frozen=True)
class Flattening(GeneralizedWeighting):
    """A weighting of every loss as a separate objective: flattens the generalized Gramian to [m, m], m = m1 ... mk.

    Attributes:
        weighting: The weighting of the m objectives, any callable G -> w.
    """

    weighting: Callable[[Tensor], Tensor]

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """Compute the weights [m1, ..., mk] from the generalized Gramian [m1, ..., mk, mk, ..., m1]."""
        order = gramian.ndim // 2
        shape = gramian.shape[:order]
        if gramian.ndim % 2 or not order or gramian.shape[order:] != shape[::-1]:
            raise ValueError(
                f"A generalized Gramian has the shape [m1, ..., mk, mk, ..., m1]; this one has {list(gramian.shape)}."
            )
        # The second half of the dimensions is mirrored: reverse it before flattening.
        mirrored = [*range(order), *reversed(range(order, gramian.ndim))]
        m = shape.numel()
        return self.weighting(gramian.permute(mirrored).reshape(m, m)).reshape(shape)


def checked_gramian(gramian: Tensor) -> Tensor:
    """Return the Gramian [m, m] symmetrised in float64, or raise a `ValueError` that says why it isn't one."""
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1]:
        hint = " Wrap the weighting in Flattening for a generalized Gramian." if gramian.ndim > 2 else ""
        raise ValueError(f"A Gramian is a square matrix [m, m]; this one has the shape {list(gramian.shape)}.{hint}")
    if not len(gramian):
        raise ValueError("The Gramian is empty: there are no objectives to weigh.")
    if not gramian.is_floating_point():
        raise ValueError(f"A Gramian has a floating dtype; this one has {gramian.dtype}.")
    double = _in_double(gramian)
    # The usual case needs one transfer from the device: the sum is 0 only for a symmetric Gramian of finite entries
    # (inf - inf and NaN are not 0) without a negative diagonal.
    asymmetry = (double - double.mT.contiguous()).abs_().sum()
    if (asymmetry - double.diagonal().amin().clamp_(max=0)).item() == 0:
        return double
    # With low-precision rows the two halves of G differ by rounding: half of the digits must agree.
    symmetric = (double + double.mT) / 2
    scale = double.diagonal().clamp(min=0).sqrt()
    tolerance = torch.finfo(gramian.dtype).eps ** 0.5
    excess = (double - symmetric).abs_() - tolerance * torch.outer(scale, scale)
    if not torch.where(double.diagonal().amin() >= 0, excess.amax(), torch.inf) <= torch.finfo(gramian.dtype).tiny:
        _explain_gramian(double, excess)
    return symmetric


def _explain_gramian(gramian: Tensor, excess: Tensor) -> None:
    finite = gramian.isfinite()
    if not finite.all():
        bad = (~finite).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            f"The Gramian is not finite: rows {bad} have NaN or infinite entries. Leave those objectives out, or look "
            f"for the loss or the gradient that overflowed."
        )
    diagonal = gramian.diagonal()
    if (diagonal < 0).any():
        i = int(diagonal.argmin())
        raise ValueError(f"A Gramian's diagonal holds squared norms, but entry [{i}, {i}] is {diagonal[i].item():g}.")
    i, j = divmod(int(excess.argmax()), len(gramian))
    raise ValueError(
        f"A Gramian is symmetric, but entry [{i}, {j}] is {gramian[i, j].item():g} and entry [{j}, {i}] is "
        f"{gramian[j, i].item():g}."
    )


def checked_losses(losses: Tensor) -> Tensor:
    """Return the losses [m] in float64, or raise a `ValueError` that says what is wrong with them."""
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"Losses have the shape [m], m >= 1; these have the shape {list(losses.shape)}.")
    if not losses.is_floating_point():
        raise ValueError(f"Losses have a floating dtype; these have {losses.dtype}.")
    double = _in_double(losses)
    if not double.isfinite().all():
        raise ValueError(f"The losses are not finite: {double.tolist()}. Leave those objectives out.")
    return double


def checked_names(names: Names | None, m: int) -> Names:
    """Return the m names, `range(m)` for None; raise a `ValueError` if there are not m different names."""
    if names is None:
        return range(m)
    if len(names) != m or len(set(names)) != m:
        raise ValueError(f"names has to hold {m} different names, one per objective; it is {list(names)}.")
    return names


def _in_double(tensor: Tensor) -> Tensor:
    # Apple's GPUs have no float64, and copying m x m numbers is cheap.
    device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device=device, dtype=torch.float64).contiguous()

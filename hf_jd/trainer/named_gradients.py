"""Objectives by name whose rows are whole gradients: rewards, and a trainer's own list of losses."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_jd.gramian import Jacobian
from hf_jd.gramian.random_streams import RandomState
from hf_jd.objectives import Membership, ObjectiveTable
from hf_jd.trainer.backward import Passed, Recorded, Recorder
from hf_jd.trainer.splitting import Whose
from hf_jd.trainer.update import Update

if TYPE_CHECKING:
    pass


class Named:
    """A micro-batch's loss by name, with its graph, in place of the instances' shares.

    Args:
        content: The recorder forms rows from it; None once the graph is freed.
    """

    normalised = True
    rest = None

    def __init__(self, content: Any):
        self.content = content

    def release(self) -> None:
        """Frees the graph."""
        self.content = None


class Rows(NamedTuple):
    """The rows of a micro-batch's objectives.

    Attributes:
        jacobian: [K, n].
        extra: The gradient of the part of the loss that no weighting sees; may be empty.
    """

    jacobian: Jacobian
    extra: dict[nn.Parameter, Tensor]


class NamedRecorder(Recorder):
    """Records micro-batches by name; see `Recorder`."""

    @abstractmethod
    def split(self, loss: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Splits a loss by name.

        Returns:
            The content for `form` and `weighted`; the count of each objective [K]; and the number [] left out because
            they aren't finite.
        """

    @abstractmethod
    def form(self, content: Any) -> Rows:
        """Forms the rows."""

    @abstractmethod
    def weighted(self, content: Any, weights: Tensor) -> Tensor:
        """Returns a scalar with the gradient of the loss, with each objective times its weight [K]."""

    def rows(self, passed: Passed) -> Recorded:
        """Forms the rows of a micro-batch's objectives."""
        assert isinstance(passed.shares, Named)
        jacobian, extra = self.form(passed.shares.content)
        passed.shares.release()
        self.has_rest |= bool(extra)
        return Recorded(passed.table, jacobian, passed.broken, True, extra, None)

    def gradient_row(self, loss: Tensor) -> Jacobian:
        """Computes the row of one objective with a plain backward pass."""
        return self.jacobian_of(self.trainer.engine().gradients(loss) if loss.requires_grad else {})

    def _passed(self, batch: Any, whose: Whose, loss: Tensor, streams: RandomState | None = None) -> Passed:
        content, counts, broken = self.split(loss * (self.scale / self.backend.divisor()))
        self.trainer.jd_outputs.take()  # discarded
        unknown = torch.full_like(counts, torch.nan, dtype=torch.float64)
        names = torch.arange(len(counts), device=counts.device)
        labels = torch.stack([torch.full_like(names, -1), names], dim=1)
        table = ObjectiveTable.of(torch.stack([unknown, unknown, counts.double()], dim=1), labels)
        members = Membership(names[:0], labels[:, 0], names)
        shares: Any = Named(content)
        return Passed(batch, whose, None, None, shares, members, table, broken)


class NamedUpdate(Update):
    """An update by name; see `Update`."""

    recorder: NamedRecorder

    def _weighted(self, passed: Passed, weights: Tensor, rest: bool) -> Tensor:
        assert isinstance(passed.shares, Named)
        return self.recorder.weighted(passed.shares.content, weights)

    def _measure_again(self) -> None:
        raise ValueError(
            f"Update {self.trainer.state.global_step + 1}: the gradient isn't finite, but was not measured, so it is "
            "unknown what to leave out: lower the learning rate, or measure at every update."
        )

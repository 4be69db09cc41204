"""Objectives by name whose rows are whole gradients: rewards, and a trainer's own list of losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_jd.gramian import Jacobian
from hf_jd.gramian.random_streams import RandomState
from hf_jd.objectives import Membership, ObjectiveTable
from hf_jd.trainer.splitting.cut import Contents
from hf_jd.trainer.step.backward import Passed, Recorded, Recorder


class NamedLosses(ABC):
    """A micro-batch's loss by name, with its graph, in place of the instances' shares.

    Attributes:
        names: The K objectives' names.
        counts: [K] the number of losses of each; 0 if it has none, or none that is finite.
        broken: [] the number of instances or losses left out because they aren't finite.
    """

    names: Sequence[str]
    counts: Tensor
    broken: Tensor
    normalised = True
    rest = None

    @abstractmethod
    def rows(self, recorder: NamedRecorder) -> tuple[Jacobian, dict[nn.Parameter, Tensor]]:
        """Form the rows [K, n], and the gradient of the part of the loss that no weighting sees, if any."""

    @abstractmethod
    def weighted(self, weights: Tensor, members: Membership, rest: bool) -> Tensor:
        """Return a scalar with the gradient of the loss, with each objective times its weight [K]; see `Shares`."""

    @abstractmethod
    def release(self) -> None:
        """Free the graph."""


class NamedRecorder(Recorder):
    """A `Recorder` of losses by name, for a trainer that has `named_losses`."""

    trainer: Any

    def rows(self, passed: Passed) -> Recorded:
        """Form the rows of a micro-batch's objectives."""
        losses: Any = passed.shares
        jacobian, extra = losses.rows(self)
        losses.release()
        self.has_rest |= bool(extra)
        return Recorded(passed.table, jacobian, passed.broken, True, extra, None)

    def gradient_row(self, loss: Tensor) -> Jacobian:
        """Compute the row of one objective with a plain backward pass."""
        return self.jacobian_of(self.trainer.engine().gradients(loss) if loss.requires_grad else {})

    def again(self, first: Passed, model: nn.Module, keep: Tensor | None = None) -> Passed:
        """Refuse to measure a micro-batch whose plain gradient was not finite."""
        raise ValueError(
            f"Update {self.trainer.state.global_step + 1}: the gradient isn't finite, but was not measured, so it is "
            "unknown what to leave out: lower the learning rate, or measure at every update."
        )

    def _passed(self, batch: Any, contents: Contents, loss: Tensor, streams: RandomState | None = None) -> Passed:
        losses = self.trainer.named_losses(loss * (self.scale / self.backend.divisor()))
        self.trainer.jd_outputs.take()  # discarded
        self.trainer.jd_loss_names = list(losses.names)
        counts = losses.counts.double()
        unknown = torch.full_like(counts, torch.nan)
        names = torch.arange(len(counts), device=counts.device)
        table = ObjectiveTable(unknown, unknown, counts, torch.full_like(names, -1), names)
        members = Membership(names[:0], table.groups, names)
        return Passed(batch, contents, None, None, losses, members, table, losses.broken)

"""TRL's lists of losses as objectives: DPO with several `loss_type`s, as in mixed preference optimisation (MPO).

TRL adds up the losses, each times its weight. If the weights require a gradient, the sum's derivative with respect to a
weight is that weight's loss, as TRL computed it: one evaluation separates all losses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_jd.contradictions import listed
from hf_jd.gramian import Jacobian
from hf_jd.objectives import Membership
from hf_jd.trainer.mixin import JDTrainerMixin
from hf_jd.trainer.step.backward import Recorder
from hf_jd.trainer.step.named_gradients import NamedLosses, NamedRecorder


class LossTypesMixin(JDTrainerMixin):
    """`JDTrainerMixin` for a trainer of TRL with a list of losses: `--jd_objectives loss` weighs these."""

    loss_types: list[str]
    loss_weights: list[Any]

    def follow_flags(self) -> None:
        """Apply the flags; see JDTrainerMixin."""
        super().follow_flags()
        self.jd_loss_weights: list[Tensor] = []
        names = self.loss_types
        if self.jd_args.jd_objectives == "loss" and (len(names) < 2 or len(set(names)) < len(names)):
            raise ValueError(
                f"--jd_objectives loss weighs several losses by name, but --loss_type is {listed(names)}: give each "
                "once, and several, or choose --jd_objectives instance or group."
            )

    @property
    def tells_losses_apart(self) -> bool:
        """See JDTrainerMixin."""
        return self.jd_args.jd_objectives == "loss"

    @property
    def recorder_class(self) -> type[Recorder]:
        """See JDTrainerMixin."""
        return NamedRecorder if self.tells_losses_apart else Recorder

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute TRL's own loss, with weights that require a gradient if its parts are objectives in training."""
        if not (self.tells_losses_apart and model.training):
            return super().compute_loss(model, inputs, *args, **kwargs)
        plain = self.loss_weights
        self.jd_loss_weights = [torch.tensor(float(w), device=self.args.device, requires_grad=True) for w in plain]
        self.loss_weights = self.jd_loss_weights
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.loss_weights = plain

    def named_losses(self, loss: Tensor) -> LossTypes:
        """Split the loss of the last batch by the trainer's list."""
        return LossTypes(self, loss)


class LossTypes(NamedLosses):
    """The losses of a trainer's list, each times its weight, and their sum; one plain backward pass per loss.

    Args:
        trainer: Has the weights with which it has computed the sum.
        loss: [] the sum, with a graph.
    """

    def __init__(self, trainer: LossTypesMixin, loss: Tensor):
        weights = trainer.jd_loss_weights
        unweighted = torch.autograd.grad(loss, weights, create_graph=True)
        self._trainer, self._loss = trainer, loss
        self._losses = [weight.detach() * part for weight, part in zip(weights, unweighted, strict=True)]
        finite = torch.stack(self._losses).detach().isfinite()
        self.names, self.counts, self.broken = trainer.loss_types, finite.long(), (~finite).sum()

    def rows(self, recorder: NamedRecorder) -> tuple[Jacobian, dict[nn.Parameter, Tensor]]:
        """Form the rows [K, n] of the losses; a router's balancing loss joins the mean."""
        extra = {}
        if getattr(self._trainer, "aux_loss_enabled", False):
            extra = self._trainer.engine().gradients(self._loss - torch.stack(self._losses).sum())
        return Jacobian.cat([recorder.gradient_row(one) for one in self._losses]), extra

    def weighted(self, weights: Tensor, members: Membership, rest: bool) -> Tensor:
        """See `NamedLosses`."""
        each = torch.stack(self._losses)
        return self._loss + ((weights.to(each) - 1) * each).sum()

    def release(self) -> None:
        """Free the graph."""
        del self._loss, self._losses

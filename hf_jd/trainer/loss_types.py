"""TRL's lists of losses as objectives: DPO with several `loss_type`s, as in mixed preference optimisation (MPO).

TRL adds up the losses, each times its weight. If the weights require a gradient, the sum's derivative with respect to a
weight is that weight's loss, as TRL computed it: one evaluation separates all losses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_jd.gramian import Jacobian
from hf_jd.trainer.mixin import JDTrainerMixin
from hf_jd.trainer.named_gradients import NamedRecorder, NamedUpdate, Rows
from hf_jd.trainer.update import Update


class LossTypesMixin(JDTrainerMixin):
    """`JDTrainerMixin` for a trainer of TRL with a list of losses: `--jd_objectives loss` weighs these."""

    loss_types: list[str]
    loss_weights: list[Any]

    def follow_flags(self) -> None:
        """Makes what the flags decide; see JDTrainerMixin."""
        super().follow_flags()
        self.jd_loss_weights: list[Tensor] = []
        if self.jd_args.jd_objectives == "loss" and len(set(self.loss_types)) < 2:
            raise ValueError(
                f"--jd_objectives loss weighs several losses, but --loss_type has only `{self.loss_types[0]}`: give "
                "several, or choose --jd_objectives instance or group."
            )

    @property
    def tells_losses_apart(self) -> bool:
        """See JDTrainerMixin."""
        return self.jd_args.jd_objectives == "loss"

    def make_update(self, model: nn.Module, batches: list[Any], alone: bool) -> Update:
        """Makes the next update; see JDTrainerMixin."""
        kind = LossTypesUpdate if self.jd_args.jd_objectives == "loss" else Update
        return kind(self, model, batches, alone)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Computes TRL's own loss, with weights that require a gradient if its parts are objectives in training."""
        if self.jd_args.jd_objectives != "loss" or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        plain = self.loss_weights
        self.jd_loss_weights = [torch.tensor(float(w), device=self.args.device, requires_grad=True) for w in plain]
        self.loss_weights = self.jd_loss_weights
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.loss_weights = plain


class LossTypesRecorder(NamedRecorder):
    """Records micro-batches by loss, with one plain backward pass per loss; see `Recorder`."""

    trainer: LossTypesMixin

    def split(self, loss: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Returns each loss times its weight, with a graph: its part of the whole."""
        weights = self.trainer.jd_loss_weights
        unweighted = torch.autograd.grad(loss, weights, create_graph=True)
        losses = [weight.detach() * part for weight, part in zip(weights, unweighted, strict=True)]
        finite = torch.stack(losses).detach().isfinite()
        return (loss, losses), finite.long(), (~finite).sum()

    def form(self, content: Any) -> Rows:
        """Forms the rows [K, n] of the losses; a router's balancing loss joins the mean."""
        loss, losses = content
        extra = {}
        if getattr(self.trainer, "aux_loss_enabled", False):
            extra = self.trainer.engine().gradients(loss - torch.stack(losses).sum())
        return Rows(Jacobian.cat([self.gradient_row(one) for one in losses]), extra)

    def weighted(self, content: Any, weights: Tensor) -> Tensor:
        """See `NamedRecorder`."""
        loss, losses = content
        each = torch.stack(losses)
        return loss + ((weights.to(each) - 1) * each).sum()


class LossTypesUpdate(NamedUpdate):
    """An update by loss; see `Update`."""

    trainer: LossTypesMixin

    def _make_recorder(self, keep_graph: bool) -> LossTypesRecorder:
        self.trainer.jd_loss_names = list(self.trainer.loss_types)
        return LossTypesRecorder(self.trainer, self.backend, self.model, None, True, False)

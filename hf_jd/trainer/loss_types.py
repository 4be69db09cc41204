"""TRL's lists of losses as objectives: DPO with several `loss_type`s, as in mixed preference optimisation (MPO).

TRL adds the losses up, each times its weight. With weights that have a gradient, the sum's derivative by a weight is
that weight's loss, as TRL computed it: one evaluation tells all losses apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_jd.gramian import Jacobian
from hf_jd.gramian.rows import DenseRows
from hf_jd.objectives import Part
from hf_jd.trainer.mixin import JDTrainerMixin
from hf_jd.trainer.recording import Extra, Recorded
from hf_jd.trainer.split_update import SplitUpdate
from hf_jd.trainer.splitting import SplitRecorder, Whose


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
                f"--jd_objectives loss weighs several losses, and --loss_type names `{self.loss_types[0]}` alone: name "
                "several, or choose --jd_objectives instance or group."
            )

    def _splits_loss(self) -> bool:
        return self.jd_args.jd_objectives == "loss" or super()._splits_loss()

    def make_update(self, model: nn.Module, batches: list[Any], alone: bool) -> SplitUpdate:
        """Makes the next update; see JDTrainerMixin."""
        kind = LossTypesUpdate if self.jd_args.jd_objectives == "loss" else SplitUpdate
        return kind(self, model, batches, alone)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's own loss, whose weights have a gradient in training where its parts are objectives."""
        if self.jd_args.jd_objectives != "loss" or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        given = self.loss_weights
        self.jd_loss_weights = [torch.tensor(float(w), device=self.args.device, requires_grad=True) for w in given]
        self.loss_weights = self.jd_loss_weights
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.loss_weights = given


class LossTypesRecorder(SplitRecorder):
    """Records micro-batches by loss, a plain backward pass each; see SplitRecorder."""

    trainer: LossTypesMixin

    def _rows(self, loss: Tensor, whose: Whose) -> Recorded:
        engine, losses = self.trainer.engine(), self._losses(loss)
        self.trainer.jd_outputs.take()
        extra = None
        if getattr(self.trainer, "aux_loss_enabled", False):
            self.has_rest = True
            extra = Extra(loss.detach() * 0, engine.gradients(loss - torch.stack(losses).sum()))
        rows = []
        for one in losses:
            found = engine.gradients(one) if one.requires_grad else {}
            formed = {p: DenseRows(g.reshape(1, -1), p.shape) for p, g in found.items()}
            rows.append(Jacobian({p: formed.get(p) for p in self.trainer.trainable()}, 1))
        finite = torch.stack(losses).detach().isfinite()
        part = _part(finite)
        return Recorded({}, None, [part], Jacobian.cat(rows), (~finite).sum(), extra)

    def _multiplied(self, loss: Tensor, whose: Whose, multipliers: Tensor | None) -> Tensor:
        if multipliers is None:
            return loss
        losses = torch.stack(self._losses(loss))
        return loss + ((multipliers.to(losses) - 1) * losses).sum()

    def _losses(self, loss: Tensor) -> list[Tensor]:
        """Each loss times its weight, with a graph, as it is a part of the whole."""
        weights = self.trainer.jd_loss_weights
        found = torch.autograd.grad(loss, weights, create_graph=True)
        return [weight.detach() * part for weight, part in zip(weights, found, strict=True)]


class LossTypesUpdate(SplitUpdate):
    """An update by loss; see SplitUpdate."""

    trainer: LossTypesMixin

    def __init__(self, trainer: LossTypesMixin, model: nn.Module, batches: list[Any], alone: bool):
        super().__init__(trainer, model, batches, alone)
        trainer.jd_loss_names = list(trainer.loss_types)

    def _make_recorder(self, num_items: Any, micro_batches: int) -> SplitRecorder:
        return LossTypesRecorder(self.trainer, self.model, None, True)

    def _multipliers(self) -> Tensor:
        trainer, step = self.trainer, self.trainer.state.global_step
        return torch.tensor([trainer.jd_control.multiplier(name, step) for name in trainer.loss_types])


def _part(finite: Tensor) -> Part:
    """One objective per loss; those that aren't finite are left out."""
    unknown = torch.full_like(finite, torch.nan, dtype=torch.float64)
    names = torch.arange(len(finite), device=finite.device)
    none = torch.full_like(names, -1)
    return Part(unknown, none, none, names, finite.long(), torch.ones_like(unknown), finite)

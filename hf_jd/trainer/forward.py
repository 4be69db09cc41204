"""The losses' side of the trainer: a batch -> unreduced losses, and what Trainer would divide them by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_jd.arguments import JDArguments
from hf_jd.collator import GROUP_KEY
from hf_jd.distributed.processes import process_count
from hf_jd.losses import LOSSES, bare, check_targets, is_summed, loss_kind, model_inputs, rest

logger = logging.get_logger(__name__)

Host = Trainer if TYPE_CHECKING else object


class Forward(NamedTuple):
    """What a batch's forward pass brought.

    Attributes:
        losses: [B] or [B, T], unreduced.
        counted: Which of them count (bool), the same shape.
        groups: [B] the groups' ids, if there are groups.
        extra: [] the part of the model's loss that no token or instance owns, if it has one.
    """

    losses: Tensor
    counted: Tensor
    groups: Tensor | None
    extra: Tensor | None


class LossesMixin(Host):
    """What `JDTrainerMixin` knows of losses."""

    jd_args: JDArguments
    jd_loss_func: Callable[..., Any] | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # What the built-in losses leave over of the model's own loss in the last forward, if they do; None: not known.
        self._jd_extra_loss: Tensor | None = None
        self._jd_has_extra: bool | None = None
        self._jd_summed = False
        self.jd_again = False
        self.jd_loss_func = self.compute_loss_func
        if self.jd_loss_func is not None:
            self.compute_loss_func = self._batch_loss

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
        """Computes the unreduced losses of a batch: the one method to override for a loss of your own.

        Args:
            model: Call it, not what it wraps.
            inputs: The batch.

        Returns:
            One loss for each instance [B], or for each token [B, T] with a bool tensor [B, T] that says which count.

        Raises:
            ValueError: There is no built-in loss for the model or for such a batch, or the model's own loss has a part
                that no token owns, and `--jd_extra_losses` is `error`.
        """
        if self.jd_loss_func is not None:
            return self.user_losses(model(**{k: v for k, v in inputs.items() if k != "labels"}), inputs)
        core = self.accelerator.unwrap_model(model)
        kind = loss_kind(core)
        check_targets(kind, inputs)
        smoothing = self.args.label_smoothing_factor if "labels" in inputs else 0.0
        # The model's own loss is asked for once, as a reference, and where it has a part that only it knows.
        whole = not smoothing and self._jd_has_extra is not False
        outputs = model(**(inputs if whole else model_inputs(kind, inputs, core)))
        losses, counted = LOSSES[kind](outputs, inputs, bare(core), smoothing)
        self._jd_summed = is_summed(kind, core)
        if whole:
            self._keep_extra(losses, counted, outputs)
        return losses, counted

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean of the objectives in training; Trainer's own loss in evaluation."""
        if return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._jd_extra_loss = None
        losses, counted = _with_mask(self.compute_losses(model, without_groups(inputs)))
        denominator = self.denominator(losses, counted, num_items_in_batch, 1)
        total = losses.masked_fill(~counted, 0).sum()
        mean = total.div(counted.sum() if denominator is None else denominator) * process_count()
        return mean if self._jd_extra_loss is None else mean + self._jd_extra_loss

    def user_losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Any:
        """What the user's `compute_loss_func` makes of the model's outputs, if that is unreduced."""
        assert self.jd_loss_func is not None
        return _checked(self.jd_loss_func(outputs, inputs.get("labels"), num_items_in_batch=None))

    def unreduced_losses(self, model: nn.Module, batch: Mapping[str, Any], again: bool = False) -> Forward:
        """Runs a batch forward; `again` where the update has met its examples before."""
        self._jd_extra_loss, self.jd_again = None, again
        inputs = dict(self._prepare_inputs(batch))  # ty: ignore[invalid-argument-type]
        groups = inputs.pop(GROUP_KEY, None)
        with self.compute_loss_context_manager():
            losses, counted = _with_mask(self.compute_losses(model, inputs))
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return Forward(losses, counted, groups, self._jd_extra_loss)

    def denominator(self, losses: Tensor, counted: Tensor, num_items: Any, micro_batches: int) -> Tensor | None:
        """What Trainer divides a micro-batch's summed losses by, on this process; None: known when all are counted."""
        if self.jd_args.own_mean:
            return None
        one = torch.ones((), device=losses.device)
        if not (self.model_accepts_loss_kwargs or self.jd_loss_func):
            # Trainer averages the micro-batches, whatever their sizes.
            return (one if self._jd_summed else counted.sum().clamp(min=1)) * (micro_batches * process_count())
        if self._jd_summed:
            return one
        if losses.ndim == 1:
            return None
        if num_items is None:
            return counted.sum().clamp(min=1) * (micro_batches * process_count())
        # The tokens of all processes, unless the user has each process average its own.
        processes = 1 if self.args.average_tokens_across_devices else process_count()
        return torch.as_tensor(num_items * processes, device=losses.device)

    @property
    def has_extra(self) -> bool:
        """Whether the model's own loss has a part that no token or instance owns."""
        return bool(self._jd_has_extra)

    def _keep_extra(self, losses: Tensor, counted: Tensor, outputs: Any) -> None:
        """Finds out whether the model's own loss has a part that no token owns, and keeps that part."""
        if not counted.any():
            return
        left, found = rest(losses, counted, outputs["loss"], self._jd_summed)
        if self._jd_has_extra is None and losses.detach()[counted].isfinite().all():
            self._jd_has_extra = found or outputs.get("aux_loss") is not None
            if self._jd_has_extra:
                own = f"The model's own loss is {outputs['loss'].item():.6g}, {left.item():.3g} of it not its tokens'"
                if self.jd_args.jd_extra_losses == "error":
                    raise ValueError(
                        f"{own}: it has a part that no token owns, such as a router's balancing loss. Switch that off, "
                        "override `compute_losses`, or add it to the mean with --jd_extra_losses mean."
                    )
                logger.warning(f"{own}: that part is added to the mean of the objectives, and no weighting sees it.")
        if self._jd_has_extra:
            self._jd_extra_loss = left

    def _batch_loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """What Trainer asks of a `compute_loss_func`, in evaluation: one loss, from the user's unreduced ones."""
        assert self.jd_loss_func is not None
        losses, counted = _with_mask(_checked(self.jd_loss_func(outputs, labels, num_items_in_batch=None)))
        total = losses.masked_fill(~counted, 0).sum()
        return total / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


def without_groups(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without the groups' ids."""
    return {key: value for key, value in inputs.items() if key != GROUP_KEY}


def _checked(losses: Any) -> Any:
    """The losses of a user's function, if they are unreduced."""
    first = losses[0] if isinstance(losses, tuple) else losses
    if not isinstance(first, Tensor) or first.ndim == 0:
        raise ValueError(
            "compute_loss_func returned one loss for the whole batch, and objectives need one for each instance [B], "
            "or for each token [B, T] with a bool tensor of those that count: leave out its last mean or sum."
        )
    return losses


def _with_mask(losses: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Splits what `compute_losses` returned; without a mask, every loss counts."""
    return losses if isinstance(losses, tuple) else (losses, torch.ones_like(losses, dtype=torch.bool))

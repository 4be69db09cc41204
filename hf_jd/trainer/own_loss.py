"""The model's own loss, beside ours: what has it that no token or instance owns, and is it the same one at all?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_jd.losses import bare, differs, loss_kind, reads_logits, reduced

logger = logging.get_logger(__name__)

_KNOWN = ("transformers.trainer", "hf_jd.trainer.forward")
"""The modules whose `compute_loss` gives the loss that `compute_losses` gives before it is reduced."""


class OwnLoss:
    """Compares the model's own loss with the mean of ours, in each forward pass in which it may have become another.

    A part that only the model knows is learnt once, in the first pass that tells. Afterwards any other difference is an
    error: a penalty that was 0 then, weights of classes that the first logits did not show.

    Attributes:
        has_extra: Whether there is such a part; None: not known.
        name: What that part is called.
    """

    def __init__(self):
        self.has_extra: bool | None = None
        self.name = "extra"
        # Whether that part is a router's balancing loss alone, which can be had without the model's own loss.
        self.is_router = False
        # [3] of each pass since the last check: whether there is a difference, the model's own loss, and ours.
        self.compared: list[Tensor] = []

    def asks(self, core: nn.Module) -> bool:
        """Whether the model has to compute its own loss: not once it is known, in a model of transformers as it came.

        Code of somebody else's may change its loss at any step.
        """
        model: Any = bare(core)
        replaced = "_loss_function" in vars(model) or (
            "forward" in vars(model) and not hasattr(model, "_original_forward")
        )
        adapters = getattr(core, "peft_config", {}).values()
        adds = any(getattr(adapter, "orth_reg_weight", 0) for adapter in adapters)  # AdaLoRA, to the loss
        foreign = replaced or adds or not type(model).__module__.startswith("transformers.models.")
        return foreign or self.has_extra is None or (self.has_extra and not self.is_router)

    def released(self, outputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The outputs, with the model's own loss out of its graph where that isn't needed, before ours takes memory."""
        settled = self.has_extra is False or self.is_router
        return {**outputs, "loss": outputs["loss"].detach()} if settled and "loss" in outputs else outputs

    def extra(
        self,
        losses: Tensor,
        counted: Tensor,
        outputs: Mapping[str, Any],
        core: nn.Module,
        asked: str,
        summed: bool = False,
    ) -> Tensor | None:
        """The part of the model's own loss that no token or instance owns, with a graph; None where there is none.

        Args:
            losses: Unreduced.
            counted: Which of them count, the same shape.
            outputs: Of the model, with its own loss and, if it has one, a router's.
            core: The model.
            asked: `--jd_extra_losses`.
            summed: Whether its own loss is the sum of the losses, instead of their mean.
        """
        if not counted.any():
            return None
        ours = reduced(losses, counted, summed)
        if outputs.get("loss") is None:
            return _of_router(outputs, core, ours) if self.is_router else None
        whole = outputs["loss"]
        if self.has_extra is None and losses.detach()[counted].isfinite().all():
            self._learn(whole, ours, outputs, core, asked)
        if self.has_extra is None or (self.has_extra and not self.is_router):
            return whole.to(ours) - ours if self.has_extra else None
        extra = _of_router(outputs, core, ours) if self.is_router else None
        if torch.is_grad_enabled():
            expected = ours.detach() if extra is None else (ours + extra).detach()
            different = differs(whole, expected, _in_half(outputs), at_every_step=True)
            self.compared.append(torch.stack([different.to(expected), whole.detach().to(expected), expected]))
        return extra

    def check(self) -> None:
        """Raises a ValueError where the model's own loss was another one than ours since the last check."""
        compared, self.compared = self.compared, []
        if not compared:
            return
        for different, whole, ours in torch.stack(compared).tolist():
            if different:
                _refuse(whole, ours, "In the first step they were the same. ")

    def _learn(self, whole: Tensor, ours: Tensor, outputs: Mapping[str, Any], core: nn.Module, asked: str) -> None:
        """Finds out whether the model's own loss has a part that no token owns, and whether that is a router's."""
        half, aux = whole.dtype.itemsize == 2, outputs.get("aux_loss")
        left = whole.to(ours) - ours
        found = bool(differs(whole, ours, half))
        router = None if aux is None or loss_kind(core) != "ForCausalLM" else _of_router(outputs, core, ours)
        self.is_router = router is not None and not differs(whole, ours + router, half)
        if found and not self.is_router and reads_logits(left, whole, outputs):
            _refuse(whole.item(), ours.item())
        self.has_extra = found or aux is not None
        if not self.has_extra:
            return
        self.name = "extra" if aux is None else "aux_loss"
        own = f"The model's own loss is {whole.item():.6g}, {left.item():.3g} of it not its tokens'"
        if asked == "error":
            raise ValueError(
                f"{own}: it has a part that no token owns, such as a router's balancing loss. Switch that off, "
                "override `compute_losses`, add it to the mean with --jd_extra_losses mean, or make it an "
                "objective of its own with --jd_extra_losses objective."
            )
        if asked == "mean":
            logger.warning(f"{own}: that part is added to the objectives' mean, and no weighting sees it.")


def _of_router(outputs: Mapping[str, Any], core: nn.Module, ours: Tensor) -> Tensor | None:
    """A router's balancing loss, as its coefficient has it at this step; None where the model has no coefficient."""
    coefficient = getattr(bare(core), "router_aux_loss_coef", None)
    return None if coefficient is None else coefficient * outputs["aux_loss"].to(ours)


def _in_half(outputs: Mapping[str, Any]) -> bool:
    """Whether a loss may have been computed in half precision, whatever it was cast to."""
    found = [value for value in outputs.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return any(value.dtype.itemsize == 2 or torch.is_autocast_enabled(value.device.type) for value in found)


def _refuse(whole: float, ours: float, before: str = "") -> NoReturn:
    raise ValueError(
        f"The model's own loss is {whole:.6g}, and the mean of its tokens' or instances' losses, as they are computed "
        f"for models of its kind, is {ours:.6g}. {before}So it has a loss or a part that isn't known, such as weights "
        "of classes, other targets, or a penalty that was 0 before, and would be trained with another loss than its "
        "own: override `compute_losses`, and return one loss for each instance or token."
    )


def overridden(trainer: Any) -> str | None:
    """Which of `compute_losses` and `compute_loss` is the user's own, the nearer one; None: neither is.

    Be it a class's, an instance's or one that was put in the place of Trainer's. A step of the user's own, right of the
    mixin, has a loss of its own as well.
    """
    right = False
    for attributes in (vars(trainer), *(vars(cls) for cls in type(trainer).__mro__)):
        unreduced = attributes.get("compute_losses")
        if unreduced is not None and getattr(unreduced, "__module__", None) not in _KNOWN:
            return "compute_losses"
        own = attributes.get("compute_loss")
        if own is not None and (getattr(own, "__module__", None) not in _KNOWN or hasattr(own, "__wrapped__")):
            return "compute_loss"
        step = getattr(attributes.get("training_step"), "__module__", None)
        if right and step is not None and step not in _KNOWN:
            return "compute_loss"
        right = right or step == "hf_jd.trainer.mixin"
    return None

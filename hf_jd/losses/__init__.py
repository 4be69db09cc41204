"""What the tokens of a batch lose, unreduced, by the model's kind of loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_jd.losses.causal_lm import causal_lm

LOSSES = {"ForCausalLM": causal_lm}

__all__ = ["LOSSES", "causal_lm", "check_mean", "loss_kind"]


def loss_kind(model: nn.Module) -> str:
    """The key of `LOSSES` for a model, with or without PEFT's wrappers.

    Raises:
        ValueError: There is none.
    """
    core: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # ty: ignore[not-callable]
    kind = getattr(core, "loss_type", None)
    if kind is None and type(core).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        kind = "ForCausalLM"  # As GPT2LMHeadModel, whose name does not say it.
    if kind not in LOSSES:
        raise ValueError(
            f"{type(core).__name__} has no built-in unreduced loss (there are: {', '.join(LOSSES)}): override "
            "`compute_losses` and return one loss for each instance or token."
        )
    return kind


def check_mean(losses: Tensor, counted: Tensor, mean: Tensor) -> None:
    """Makes sure that nothing is missing in unreduced losses.

    Args:
        losses: Unreduced.
        counted: Which of them count, the same shape.
        mean: The model's own loss.

    Raises:
        ValueError: The model's own loss isn't their mean: it has a part that no token owns.
    """
    ours = losses.detach().masked_fill(~counted, 0).sum() / counted.sum()
    theirs = mean.detach().to(ours)
    if ours.isfinite() and not ours.isclose(theirs, rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"The model's own loss is {theirs.item():.6g}, but the mean over its tokens is {ours.item():.6g}: it has a "
            "part that no token owns, such as a router's balancing loss. Switch that off, or override `compute_losses`."
        )

"""The loss of speech recognition by connectionist temporal classification (CTC)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_jd.losses.cross_entropy import IGNORED


def ctc(
    outputs: Mapping[str, Any], inputs: Mapping[str, Any], model: Any, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Compute the loss of each recording like ForCTCLoss; divided by its number of labels for the reduction "mean".

    Args:
        outputs: `logits` [B, T, V].
        inputs: `labels` [B, U], -100 or the blank for none; `input_values` or `input_features`, and `attention_mask`.
        model: Gives the number of frames of a recording; its config has the rest.
        label_smoothing: Has to be 0.

    Returns:
        The losses [B], and where they count [B] (bool): everywhere.

    Raises:
        ValueError: Label smoothing is set, or the model doesn't say how many frames a recording has.
    """
    if label_smoothing:
        raise ValueError(
            f"--label_smoothing_factor is {label_smoothing}, but a CTC loss has no labels to smooth: set it to 0."
        )
    if not hasattr(model, "_get_feat_extract_output_lengths"):
        raise ValueError(
            f"{type(model).__name__} does not say how many frames a recording has: override `compute_losses` and "
            "return one loss per recording."
        )
    logits, labels, config = outputs["logits"], inputs["labels"].to(outputs["logits"].device), model.config
    mask = inputs.get("attention_mask")
    if mask is None:
        values = inputs["input_values"] if "input_values" in inputs else inputs["input_features"]
        mask = torch.ones(values.shape[:2], dtype=torch.long, device=logits.device)
    frames = model._get_feat_extract_output_lengths(mask.sum(-1)).to(torch.long)
    labelled = (labels != IGNORED) & (labels != config.pad_token_id)
    lengths = labelled.sum(-1)
    with torch.backends.cudnn.flags(enabled=False):
        losses = F.ctc_loss(
            F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1),
            labels.masked_select(labelled),
            frames,
            lengths,
            blank=config.pad_token_id,
            reduction="none",
            zero_infinity=config.ctc_zero_infinity,
        )
    if config.ctc_loss_reduction == "mean":
        losses = losses / lengths.clamp(min=1)
    return losses, torch.ones(len(losses), dtype=torch.bool, device=losses.device)

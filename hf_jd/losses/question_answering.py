"""The loss of extractive question answering, which predicts where the answer starts and ends."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def question_answering(
    outputs: Mapping[str, Any], inputs: Mapping[str, Any], model: nn.Module, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Compute the losses of each instance's start and end, scaled so that their mean is ForQuestionAnsweringLoss.

    That loss is the mean of two means, over the starts and over the ends inside the input. As their numbers may differ,
    each loss is multiplied by (starts + ends) / (2 starts), or / (2 ends).

    Args:
        outputs: `start_logits` and `end_logits` [B, T].
        inputs: `start_positions` and `end_positions` [B]; positions of T or more are ignored.
        model: Unused.
        label_smoothing: Unused, as in Trainer, which smooths `labels` only.

    Returns:
        The losses [B, 2], and where they count [B, 2] (bool).
    """
    named = start_and_end(outputs, inputs)
    counted = torch.stack([counts for _, counts in named.values()], dim=1)
    values = torch.stack([losses for losses, _ in named.values()], dim=1)
    totals = counted.sum(0).to(values.dtype)
    return values * (totals.sum() / totals.clamp(min=1)), counted


def start_and_end(outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute the losses of starts and ends, half the cross-entropy each: their means sum to ForQuestionAnsweringLoss.

    Args:
        outputs: As for `question_answering`.
        inputs: As for `question_answering`.

    Returns:
        By name, the losses [B], and where they count [B] (bool).
    """
    named = {}
    for name in ("start", "end"):
        logits = outputs[f"{name}_logits"]
        length = logits.shape[1]
        positions = inputs[f"{name}_positions"].view(-1).to(logits.device).clamp(0, length)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, positions, ignore_index=length, reduction="none")
        named[name] = (losses / 2, positions < length)
    return named

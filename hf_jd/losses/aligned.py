"""Losses of heads whose logits align with the labels: tagging, masked tokens, encoder-decoders, multiple choice."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_jd.losses.cross_entropy import cross_entropy


def aligned(
    outputs: Mapping[str, Any], inputs: Mapping[str, Any], model: nn.Module, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Computes the cross-entropy of each label.

    Args:
        outputs: `logits` [B, T, V], per token; or [B, C], per instance.
        inputs: `labels` [B, T] or [B], -100 where there is nothing to predict.
        model: Unused.
        label_smoothing: Between 0 and 1.

    Returns:
        The losses and where they count (bool), shaped like the labels.

    Raises:
        ValueError: The shapes of logits and labels don't match.
    """
    return cross_entropy(outputs["logits"], inputs["labels"], label_smoothing, outputs.get("loss"))

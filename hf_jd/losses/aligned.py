"""Heads whose logits stand where their labels do: tagging, masked tokens, answers of decoders, multiple choice."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_jd.losses.cross_entropy import cross_entropy


def aligned(
    outputs: Mapping[str, Any], inputs: Mapping[str, Any], model: nn.Module, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each label.

    Args:
        outputs: `logits` [B, T, V], one row per token; or [B, C], one per instance.
        inputs: `labels` [B, T] or [B], -100 where nothing is to be predicted.
        model: Unused.
        label_smoothing: Between 0 and 1.

    Returns:
        The losses and where they count (bool), shaped like the labels.

    Raises:
        ValueError: The logits and labels don't belong together.
    """
    return cross_entropy(outputs["logits"], inputs["labels"], label_smoothing, outputs.get("loss"))

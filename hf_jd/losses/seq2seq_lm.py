"""Encoder-decoders, for text or speech: the decoder's inputs are shifted, and its labels aren't."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_jd.losses.cross_entropy import cross_entropy


def seq2seq_lm(
    outputs: Mapping[str, Any], inputs: Mapping[str, Any], model: nn.Module, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """The loss of each token of the answer.

    Args:
        outputs: `logits` [B, T, V] of the decoder.
        inputs: `labels` [B, T], -100 where nothing is to be predicted.
        model: Unused.
        label_smoothing: Between 0 and 1.

    Returns:
        The losses [B, T] and where they count (bool), the same shape.

    Raises:
        ValueError: The logits and labels don't belong together.
    """
    return cross_entropy(outputs["logits"], inputs["labels"], label_smoothing)

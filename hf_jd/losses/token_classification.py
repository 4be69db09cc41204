"""Token classification: each token has a class."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_jd.losses.cross_entropy import cross_entropy


def token_classification(
    outputs: Mapping[str, Any], inputs: Mapping[str, Any], model: nn.Module, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """The loss of each labelled token.

    Args:
        outputs: `logits` [B, T, C].
        inputs: `labels` [B, T], -100 for tokens without a class, such as the later pieces of a word.
        model: Unused.
        label_smoothing: Between 0 and 1.

    Returns:
        The losses [B, T] and where they count (bool), the same shape.

    Raises:
        ValueError: The logits and labels don't belong together.
    """
    return cross_entropy(outputs["logits"], inputs["labels"], label_smoothing)

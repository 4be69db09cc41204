"""Multiple choice: one of the C candidates of an instance is right."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_jd.losses.cross_entropy import cross_entropy


def multiple_choice(
    outputs: Mapping[str, Any], inputs: Mapping[str, Any], model: nn.Module, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """The loss of each instance.

    Args:
        outputs: `logits` [B, C], one for each candidate.
        inputs: `labels` [B], the right candidate.
        model: Unused.
        label_smoothing: Between 0 and 1.

    Returns:
        The losses [B] and where they count (bool), the same shape.

    Raises:
        ValueError: The logits and labels don't belong together.
    """
    return cross_entropy(outputs["logits"], inputs["labels"], label_smoothing)

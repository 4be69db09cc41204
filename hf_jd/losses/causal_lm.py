"""The loss of causal language modelling, where each token predicts the next one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_jd.losses.cross_entropy import IGNORED, cross_entropy


def causal_lm(
    outputs: Mapping[str, Any], inputs: Mapping[str, Any], model: nn.Module, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Compute the loss of each token like ForCausalLMLoss (in at least float32, whatever the model's dtype).

    Args:
        outputs: `logits` [B, T', V]; T' > T if virtual tokens come first.
        inputs: `labels` [B, T], -100 where there is nothing to predict; or, in their place, `shift_labels` [B, T],
            which are already shifted by one.
        model: Unused.
        label_smoothing: Between 0 and 1.

    Returns:
        The losses [B, T'], 0 where nothing is predicted, and where they count [B, T'] (bool).

    Raises:
        ValueError: The shapes of logits and labels don't match.
    """
    logits, labels, targets = outputs["logits"], inputs["labels"], inputs.get("shift_labels")
    if targets is None:
        targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        # PEFT's virtual tokens have no labels, but the last of them predicts the first real token.
        virtual = logits.shape[1] - labels.shape[1]
        if virtual > 0:
            targets = F.pad(torch.cat([labels[:, :1], targets], dim=1), (virtual - 1, 0), value=IGNORED)
    return cross_entropy(logits, targets, label_smoothing, outputs.get("loss"), torch.float32)

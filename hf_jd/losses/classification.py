"""The losses of classifying whole texts, images, videos or sounds, and of regression, by the model's `problem_type`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_jd.losses.cross_entropy import cross_entropy


def problem_type(config: Any, labels: Tensor) -> str:
    """Return the model's problem type; if unset, infer it from the labels like transformers' heads."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def classification(
    outputs: Mapping[str, Any], inputs: Mapping[str, Any], model: nn.Module, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Compute the loss of each instance.

    This is the cross-entropy of its class; the mean binary cross-entropy over the labels (multi-label); or the mean
    squared error over the targets (regression).

    Args:
        outputs: `logits` [B, C].
        inputs: `labels` [B] class ids, -100 for none; or [B, C] (float), 0 or 1 each; or [B] or [B, C] (float) targets.
        model: Its config has `problem_type` and `num_labels`.
        label_smoothing: Between 0 and 1; for classes only.

    Returns:
        The losses [B], and where they count [B] (bool).

    Raises:
        ValueError: The shapes of logits and labels don't match, or smoothing is set for labels that aren't classes.
    """
    logits, labels = outputs["logits"], inputs["labels"]
    kind = problem_type(model.config, labels)
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.view(-1), label_smoothing)
    if label_smoothing:
        raise ValueError(
            f"--label_smoothing_factor is {label_smoothing}, but there are no classes to smooth in a model with "
            f"problem_type `{kind}`: leave it at 0."
        )
    if labels.numel() != logits.numel():
        raise ValueError(
            f"Logits of shape {list(logits.shape)} don't belong to labels of shape {list(labels.shape)} with "
            f"problem_type `{kind}`: give {logits.shape[-1]} labels per instance."
        )
    labels = labels.to(logits.device).view_as(logits)
    if kind == "regression":
        losses = F.mse_loss(logits, labels.to(torch.promote_types(logits.dtype, labels.dtype)), reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return losses.mean(1), torch.ones(len(logits), dtype=torch.bool, device=logits.device)

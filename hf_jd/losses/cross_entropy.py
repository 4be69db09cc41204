"""Cross-entropy with label smoothing, per target: the core of most losses, and all of those that align with labels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100

# Autograd's nodes that preserve the numbers and their order.
_SAME_NUMBERS = {
    "AliasBackward0",
    "ReshapeAliasBackward0",
    "ToCopyBackward0",
    "UnsafeViewBackward0",
    "ViewBackward0",
    "_DDPSinkBackward",
}
_BETWEEN = 12  # nodes between a loss and its log-probabilities: divisions, factors, casts


def aligned(
    outputs: Mapping[str, Any], inputs: Mapping[str, Any], model: nn.Module, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Compute the losses of heads whose logits align with the labels: tagging, masked tokens, encoder-decoders.

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


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    loss: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the loss of each target, like transformers' heads and LabelSmoother before they reduce it.

    With p the model's probabilities, y the target and e the smoothing, a loss is
    (1 - e) * -log p(y) + e * mean_v -log p(v).

    Args:
        logits: [..., V].
        targets: [...] class ids, -100 where there is nothing to predict.
        label_smoothing: e, between 0 and 1.
        loss: [] the model's own loss, if there is one: if autograd has saved log p for its backward, log p is read from
            there, since computing it takes a tenth of a small model's step.
        dtype: What it is computed in without smoothing; None: the logits' own, but at least float32.

    Returns:
        The losses [...], 0 where nothing is predicted, and where they count [...] (bool).

    Raises:
        ValueError: The shapes of logits and targets don't match.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"Logits of shape {list(logits.shape)} don't belong to labels of shape {list(targets.shape)}: return one "
            "loss per token or per instance from your own `compute_losses`."
        )
    targets = targets.to(logits.device)
    log_p = _saved_log_probabilities(loss, logits)
    if log_p is None:
        # LabelSmoother takes the logarithm in the logits' own dtype.
        dtype = logits.dtype if label_smoothing else dtype or torch.promote_types(logits.dtype, torch.float32)
        log_p = F.log_softmax(logits, dim=-1, dtype=dtype)
    losses = -log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        uniform = -log_p.sum(-1, dtype=torch.float32) / logits.shape[-1]
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
    return losses.masked_fill(targets == IGNORED, 0.0), targets != IGNORED


def _saved_log_probabilities(loss: Tensor | None, logits: Tensor) -> Tensor | None:
    """Return log p of the logits [..., V], as saved by autograd for the loss's backward; None if it wasn't."""
    place = (None, 0) if loss is None else (loss.grad_fn, loss.output_nr)
    for _ in range(_BETWEEN):
        node, index = place
        if node is None or node.name() == "LogSoftmaxBackward0" or not node.next_functions:
            break
        place = node.next_functions[index if node.name() == "_DDPSinkBackward" else 0]
    node = place[0]
    if node is None or node.name() != "LogSoftmaxBackward0":
        return None
    if _source(*node.next_functions[0]) != _source(logits.grad_fn, logits.output_nr):
        return None
    log_p = node._saved_result  # ty: ignore[missing-attribute]
    if log_p.shape[-1] != logits.shape[-1] or log_p.numel() != logits.numel():
        return None
    return log_p.view(logits.shape)


def _source(node: Any, index: int) -> tuple[Any, int]:
    """Follow views and casts back to the node that computed the numbers."""
    while node is not None and node.name() in _SAME_NUMBERS:
        node, index = node.next_functions[index if node.name() == "_DDPSinkBackward" else 0]
    return node, index

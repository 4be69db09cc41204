"""Cross-entropy with label smoothing, per target: the core of most losses."""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Computes the loss of each target, like transformers' heads and LabelSmoother before they reduce it.

    With p the model's probabilities, y the target and e the smoothing, a loss is
    (1 - e) * -log p(y) + e * mean_v -log p(v). It is computed in at least float32.

    Args:
        logits: [..., V].
        targets: [...] class ids, -100 where there is nothing to predict.
        label_smoothing: e, between 0 and 1.

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
    if label_smoothing:
        log_probabilities = F.log_softmax(logits, dim=-1)
        nll = -log_probabilities.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        uniform = -log_probabilities.sum(-1, dtype=torch.float32) / logits.shape[-1]
        losses = (1 - label_smoothing) * nll + label_smoothing * uniform
        return losses.masked_fill(targets == IGNORED, 0.0), targets != IGNORED
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(targets), targets != IGNORED

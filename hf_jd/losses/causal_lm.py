"""Causal language modelling: each token predicts the next one."""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


def causal_lm(
    logits: Tensor, labels: Tensor, shift_labels: Tensor | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss of each token, as transformers' ForCausalLMLoss and LabelSmoother compute it before they reduce it.

    With p the model's probabilities, y the next token and e the smoothing, a token's loss is
    (1 - e) * -log p(y) + e * mean_v -log p(v).

    Args:
        logits: [B, T', V]; T' > T where a prompt of virtual tokens comes first.
        labels: [B, T] token ids, -100 where nothing is to be predicted.
        shift_labels: [B, T] the labels already shifted by one, which then replace `labels`.
        label_smoothing: e, between 0 and 1.

    Returns:
        The losses [B, T'], 0 where nothing is predicted, and where they count [B, T'] (bool).

    Raises:
        ValueError: The logits and labels don't belong together.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        # PEFT's virtual tokens have no labels, but the last of them predicts the first real token.
        virtual = logits.shape[1] - labels.shape[1]
        if virtual > 0:
            shift_labels = F.pad(torch.cat([labels[:, :1], shift_labels], dim=1), (virtual - 1, 0), value=IGNORED)
    if logits.shape[:-1] != shift_labels.shape:
        raise ValueError(
            f"Logits of shape {list(logits.shape)} don't belong to labels of shape {list(labels.shape)}: return one "
            "loss a token or an instance from your own `compute_losses`."
        )
    shift_labels = shift_labels.to(logits.device)
    if label_smoothing:
        log_probabilities = F.log_softmax(logits, dim=-1)
        nll = -log_probabilities.gather(-1, shift_labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        uniform = -log_probabilities.sum(-1, dtype=torch.float32) / logits.shape[-1]
        losses = (1 - label_smoothing) * nll + label_smoothing * uniform
        losses = losses.masked_fill(shift_labels == IGNORED, 0.0)
    else:
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), shift_labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(shift_labels)
    return losses, shift_labels != IGNORED

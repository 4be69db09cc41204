"""Measurements on top of Trainer's: loss and accuracy per token, and the time of a step."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction, TrainerCallback

from hf_jd.finetune.tokens import IGNORED
from hf_jd.report.history import STEP_TIME


def answers(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce logits to predictions and losses, so that evaluation needn't store them.

    Args:
        logits: [B, T, V], perhaps followed by other outputs.
        labels: [B, T].

    Returns:
        The most likely next token [B, T], and the loss [B, T] of each label; 0 for the first label of a row, which is
        never predicted.
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    losses = torch.zeros(labels.shape, device=scores.device)
    for row, (score, label) in enumerate(zip(scores, labels, strict=True)):  # row by row, to copy only one to float32
        losses[row, 1:] = cross_entropy(score[:-1].float(), label[1:], reduction="none", ignore_index=IGNORED)
    return scores.argmax(-1), losses


def token_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Average over all predicted tokens, whatever their batch and process.

    Returns:
        `loss`, which Trainer takes instead of its own mean of batches' means; `accuracy`; and `majority`, the accuracy
        of always answering the most frequent token.
    """
    labels = np.asarray(prediction.label_ids)[:, 1:]
    predicted, losses = map(np.asarray, prediction.predictions)
    counted = labels != IGNORED
    if not counted.any():
        return {}
    return {
        "loss": float(losses[:, 1:][counted].mean(dtype=np.float64)),
        "accuracy": float((predicted[:, :-1] == labels)[counted].mean()),
        "majority": float(np.bincount(labels[counted]).max() / counted.sum()),
    }


class StepTimer(TrainerCallback):
    """Logs the median time of a step, from its first forward to its optimizer step: no loading, no evaluation."""

    def __init__(self):
        self._seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = _now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it."""
        self._seconds.append(_now() - self._start)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the time to the log of the steps since the last one."""
        if self._seconds:
            state.log_history[-1][STEP_TIME] = statistics.median(self._seconds)
            self._seconds.clear()


def _now() -> float:
    """Wait for the GPU, and return the time."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()

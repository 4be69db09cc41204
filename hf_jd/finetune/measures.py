"""What a run measures beside Trainer's loss: accuracy by token, and how long a step takes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, TrainerCallback

from hf_jd.finetune.results import STEP_TIMES
from hf_jd.finetune.tokens import IGNORED


def predicted_tokens(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The most likely token at each place [B, T], so that evaluation keeps no logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def token_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy over all tokens that are to be predicted.

    Returns:
        `accuracy`, and `majority`: the accuracy of always answering the most frequent token.
    """
    labels = np.asarray(prediction.label_ids)[:, 1:]
    predicted = np.asarray(prediction.predictions)[:, :-1]
    counted = labels != IGNORED
    if not counted.any():
        return {}
    return {
        "accuracy": float((predicted == labels)[counted].mean()),
        "majority": float(np.bincount(labels[counted]).max() / counted.sum()),
    }


class StepTimer(TrainerCallback):
    """Measures each step from its first forward to its optimizer step, without loading, logging and evaluation.

    Args:
        folder: The run's, where the seconds are written when training ends.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._start = _now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stops it."""
        self._seconds.append(_now() - self._start)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes what it measured."""
        if state.is_world_process_zero:
            (self._folder / STEP_TIMES).write_text(json.dumps(self._seconds), "utf-8")


def _now() -> float:
    """The time, when all that was asked of the GPU is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()

"""Refuse settings that can't work, with a ValueError, before anything is loaded."""

from __future__ import annotations

import math
import os

from huggingface_hub import HfApi
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from hf_jd.finetune.sentences import first_sentence


def check_launch(training: TrainingArguments) -> None:
    """Refuse processes that aren't connected: they would train separately into the same folder."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and training.world_size != started:
        raise ValueError(
            f"{started} processes were started, but they aren't connected, since there are no devices for them here: "
            "each would train alone, into the same folder. Add --use_cpu to train on CPUs, or start one process."
        )


def check_reporting(training: TrainingArguments) -> None:
    """Refuse to report to a tool that isn't installed."""
    targets = training.report_to if isinstance(training.report_to, list) else [training.report_to]
    available = get_available_reporting_integrations()
    for name in targets:
        if name not in available:
            others = f", or choose one of {', '.join(available)}" if available else ", or leave it out"
            raise ValueError(f"--report_to is `{name}`, which isn't installed: `pip install {name}`{others}.")


def check_hub(training: TrainingArguments) -> None:
    """Refuse to push to the Hub if it can't be reached, or the user isn't logged in."""
    if not training.push_to_hub:
        return
    try:
        HfApi().whoami(token=training.hub_token)
    except Exception as error:  # The Hub's client raises its HTTP library's errors, and has changed that library.
        raise ValueError(
            f"--push_to_hub is given, but the Hub can't be pushed to: {first_sentence(error)} Log in with "
            "`hf auth login`, or leave it out and upload later with `hf upload`."
        ) from error


def spread_over(training: TrainingArguments, examples: int) -> None:
    """Convert logging_steps, eval_steps and save_steps below 1, shares of the training, into numbers of steps.

    Trainer compares these numbers when a run is resumed.
    """
    batches = math.ceil(examples / (training.train_batch_size * training.world_size))
    epoch = math.ceil(batches / training.gradient_accumulation_steps)
    steps = training.max_steps if training.max_steps > 0 else math.ceil(epoch * training.num_train_epochs)
    for name in ("logging_steps", "eval_steps", "save_steps"):
        share = getattr(training, name)
        if share is not None and 0 < share < 1:
            setattr(training, name, math.ceil(share * steps))

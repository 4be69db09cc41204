"""Refuse settings that can't work, with a ValueError, before anything is loaded."""

from __future__ import annotations

import os

from huggingface_hub import HfApi
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from hf_jd.finetune.sentences import explained


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
    advice = "log in with `hf auth login`, or leave it out and upload later with `hf upload`"
    if training.push_to_hub:
        # Any Exception: the Hub's client raises its HTTP library's errors, and has changed that library.
        with explained(f"--push_to_hub is given, but the Hub can't be pushed to ({advice})", Exception):
            HfApi().whoami(token=training.hub_token)

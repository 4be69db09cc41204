"""What can't work, told before anything is loaded."""

from __future__ import annotations

import os

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations


def check_launch(training: TrainingArguments) -> None:
    """Refuse processes that would train separately, into one folder.

    Raises:
        ValueError: Several processes were started, and each is alone.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and training.world_size != started:
        raise ValueError(
            f"{started} processes were started, but they aren't connected, since there are no devices for them here: "
            "each would train by itself into one folder. Add --use_cpu to train on CPUs, or start one process."
        )


def check_reporting(training: TrainingArguments) -> None:
    """Refuse to report to what isn't installed.

    Raises:
        ValueError: --report_to names such a thing.
    """
    targets = training.report_to if isinstance(training.report_to, list) else [training.report_to]
    available = get_available_reporting_integrations()
    for name in targets:
        if name not in available:
            raise ValueError(
                f"--report_to is `{name}`, which isn't installed: `pip install {name}`, or choose one of "
                f"{', '.join([*available, 'none'])}."
            )

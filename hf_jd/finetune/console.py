"""What a run prints: progress bars, and one line per log. All numbers are in the run's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar


class Lines(PrinterCallback):
    """Prints each log as a line."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the log."""
        if state.is_world_process_zero and (text := line(logs or {})):
            tqdm.write(f"step {state.global_step}: {text}")


class Bars(Lines, ProgressCallback):
    """Lines of logs, with progress bars."""


def hide_bars(args: TrainingArguments) -> None:
    """Apply --disable_tqdm to loading models and data, too, where Trainer doesn't."""
    if args.disable_tqdm:
        disable_progress_bar()
        datasets.disable_progress_bars()


def use_console(trainer: Trainer) -> None:
    """Replace Trainer's dump of all numbers with one line per log."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Lines if trainer.args.disable_tqdm else Bars)


def line(logs: Mapping[str, Any]) -> str:
    """Sum up one of Trainer's logs; "" if there is nothing to say."""
    if "train_runtime" in logs:
        return f"trained for {logs['train_runtime']:.0f} s"
    parts = []
    for name, value in logs.items():
        if name == "loss":
            parts.append(f"loss {value:.3f}")
        elif name == "jd/conflicts":
            parts.append(f"{value:.0%} of the pairs in conflict")
        elif name.startswith("jd/against/") and value > 0:
            parts.append(f"against {name.removeprefix('jd/against/')}: {value:.0%} of the steps")
        elif name.startswith("eval_") and name.endswith("_loss"):
            parts.append(f"{name[5:-5] or 'evaluation'}: loss {value:.3f}")
        elif name.startswith("eval_") and name.endswith("_accuracy"):
            parts.append(f"accuracy {value:.1%}")
    return ", ".join(parts)

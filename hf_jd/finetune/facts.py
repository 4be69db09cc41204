"""`jd_run.json`: a run's settings, for its report and for resuming it."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_jd import JDTrainingArguments
from hf_jd.arguments import JDArguments
from hf_jd.finetune.flags import DataArguments, ModelArguments, RunArguments
from hf_jd.report.history import FACTS_FILE, read_facts

TRAINING = (
    "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_grad_norm", "warmup_steps", "num_train_epochs", "max_steps", "seed",
)  # fmt: skip

logger = logging.getLogger(__name__)


def facts_of(
    path: str, model: ModelArguments, data: DataArguments, run: RunArguments, training: JDTrainingArguments
) -> dict[str, Any]:
    """Collect a run's settings, by the flags' names; files are named without their folders."""
    files = ", ".join(Path(file).name for file in data.train_file or ())
    source = files or data.dataset_name or f"the embedded example `{data.example}`"
    settings = {"data": source, "max_length": data.max_length, "stock": run.stock, **asdict(model)}
    del settings["model_name_or_path"]  # which may be a path: `model` is its name
    return settings | training_facts(path, training)


def training_facts(path: str, training: Any) -> dict[str, Any]:
    """Collect the model's name, and the settings in the trainer's arguments."""
    trained = {name: getattr(training, name) for name in TRAINING}
    weighed = {field.name: getattr(training, field.name) for field in fields(JDArguments)}
    trained["lr_scheduler_type"] = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    model = Path(path).name if Path(path).exists() else path
    return {"version": version("hf-jd"), "model": model, **trained, **weighed}


class FactsWriter(TrainerCallback):
    """Writes the file when training begins, and warns if a resumed run has other settings than before.

    Args:
        folder: The run's folder.
        facts: See `facts_of`.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self._folder = folder
        self._facts = facts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the file."""
        if not state.is_world_process_zero:
            return
        before = read_facts(self._folder) if state.global_step else {}
        for name in before.keys() & self._facts.keys() - {"version"}:
            if before[name] != self._facts[name]:
                logger.warning(f"The run began with --{name} {before[name]}, and continues with {self._facts[name]}.")
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / FACTS_FILE).write_text(json.dumps(self._facts, indent=1) + "\n", "utf-8")

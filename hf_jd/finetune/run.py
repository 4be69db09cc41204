"""`hf-jd finetune`: flags -> a trained model, its evaluation by task, and its card."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, IntervalStrategy, Trainer, TrainingArguments, set_seed

from hf_jd import JDTrainer, JDTrainingArguments
from hf_jd.arguments import JDArguments
from hf_jd.finetune.card import write_card
from hf_jd.finetune.console import hide_bars, use_console
from hf_jd.finetune.data import EXAMPLE_TASK_COLUMN, Rows, load_examples
from hf_jd.finetune.facts import FactsWriter, facts_of
from hf_jd.finetune.flags import MAIN_FLAGS, DataArguments, ModelArguments, RunArguments
from hf_jd.finetune.measures import StepTimer, answers, token_metrics
from hf_jd.finetune.model import load_model, load_tokenizer, model_path
from hf_jd.finetune.parser import Parser, names_of, read_settings, split_settings
from hf_jd.finetune.preflight import check_hub, check_launch, check_reporting
from hf_jd.finetune.table import evaluation_table
from hf_jd.finetune.tokens import tokenize
from hf_jd.report.history import LOG_FILE, STATE_FILE, History
from hf_jd.trainer.run.resuming import checkpoint_to_resume, needed_files, trainer_files

RUN = ("checkpoint-*", STATE_FILE, "adapter_config.json", "adapter_model.safetensors", "model[.-]*safetensors")
"""What a run leaves in its folder, and what would be taken for another run's."""
LORA_LEARNING_RATE, FULL_LEARNING_RATE = 2e-4, 2e-5
DEFAULTS: dict[str, Any] = {
    "do_train": True,
    "learning_rate": None,  # depends on --full
    "logging_steps": 0.02,  # as shares of the training, so that short data gives a curve, too
    "eval_strategy": "steps",
    "eval_steps": 0.2,
    "eval_on_start": True,
    "save_steps": 0.2,
    "save_total_limit": 2,
}
"""Defaults that suit a few hundred examples better than those of TrainingArguments."""

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Run `hf-jd finetune`; return the exit code."""
    finetune(*parse(argv))
    return 0


def parse(
    argv: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    command: str = "finetune",
    description: str = "Fine-tune a causal language model with Jacobian descent.",
) -> tuple[ModelArguments, DataArguments, RunArguments, JDTrainingArguments]:
    """Parse flags, which override settings by name.

    Args:
        argv: `[FILE.yaml] --flag value ...`.
        settings: Further values by the flags' names, which override those in the file.
        command: The command that `--help` describes.
        description: Its description.

    Raises:
        ValueError: A flag is unknown, has a value that isn't allowed, or contradicts another.
    """
    groups: Any = [ModelArguments, DataArguments, RunArguments, JDTrainingArguments]
    parser = Parser(
        groups,
        prog=f"hf-jd {command}",
        usage="%(prog)s [FILE.yaml] [--flag value ...]",
        description=f"{description} The file holds flags as `name: value`.",
        allow_abbrev=False,
        prepare=_prepare,
        sections={
            "Jacobian descent": names_of(JDArguments),
            "Model": names_of(ModelArguments),
            "Data": names_of(DataArguments),
            "Run": names_of(RunArguments),
            "Training, as in transformers' TrainingArguments": MAIN_FLAGS,
        },
        texts={"learning_rate": f"The peak learning rate [{LORA_LEARNING_RATE:g}, with --full {FULL_LEARNING_RATE:g}]"},
    )
    parser.set_defaults(**DEFAULTS)
    flags, file = split_settings(argv)
    model, data, run, training = parser.parse(flags, {**(read_settings(file) if file else {}), **(settings or {})})
    return model, data, run, training


def _prepare(flags: dict[str, Any]) -> None:
    """Fill in flags that depend on others: --task_column and --jd_group_column are two names for one flag."""
    if flags["output_dir"] is None:
        raise ValueError("--output_dir is missing: give the folder to save the model in.")
    task, group = flags["task_column"], flags["jd_group_column"]
    if task and group and task != group:
        raise ValueError(
            f"--task_column is `{task}` and --jd_group_column is `{group}`: they are one flag, so give one of them."
        )
    embedded = not flags["train_file"] and not flags["dataset_name"]
    flags["task_column"] = flags["jd_group_column"] = task or group or (EXAMPLE_TASK_COLUMN if embedded else None)
    if flags["learning_rate"] is None:
        flags["learning_rate"] = FULL_LEARNING_RATE if flags["full"] else LORA_LEARNING_RATE


def finetune(model: ModelArguments, data: DataArguments, run: RunArguments, training: JDTrainingArguments) -> History:
    """Train, evaluate and save; without --do_train, only evaluate.

    Returns:
        The run's measurements.

    Raises:
        ValueError: Something is wrong with the data, the model or the folder; then nothing is left behind.
    """
    check_launch(training)
    check_reporting(training)
    check_hub(training)
    path, folder = model_path(model), Path(training.output_dir or "")
    existed = folder.exists()
    _check_folder(folder, run, training)
    facts = facts_of(path, model, data, run, training)
    try:
        trainer = build_trainer(path, model, data, run, training, load_examples(data))
        _train(trainer, folder, facts)
    except ValueError:
        if not existed:
            with suppress(OSError):  # Trainer made the folder; a folder with files isn't removed.
                folder.rmdir()
        raise
    results = measurements(trainer)
    if trainer.is_world_process_zero():
        if results.evaluations:
            print(f"\n{evaluation_table(results)}")
        if training.do_train:
            write_card(folder, path, data, facts, results)
            print(f"\nSaved in {folder}.")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # A process may abort if it exits within a gloo group.
    return results


def _train(trainer: Trainer, folder: Path, facts: dict[str, Any]) -> None:
    """Train and save; without --do_train, only evaluate."""
    if not trainer.args.do_train:
        if trainer.eval_dataset is None:
            raise ValueError("--do_train is false, but there is nothing to evaluate on: give --validation_file.")
        trainer.evaluate()
        return
    trainer.add_callback(FactsWriter(folder, facts))
    if not trainer.args.resume_from_checkpoint and trainer.is_world_process_zero():
        for part in [*_parts_of_a_run(folder), *folder.glob(LOG_FILE)]:
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    try:
        trainer.train(resume_from_checkpoint=_checkpoint(trainer))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_resume(folder)) from None
    evaluate_at_the_end(trainer)
    trainer.save_model()
    trainer.save_state()


def build_trainer(
    path: str,
    model: ModelArguments,
    data: DataArguments,
    run: RunArguments,
    training: JDTrainingArguments,
    examples: Mapping[str, Rows],
    kind: type[Trainer] | None = None,
) -> Trainer:
    """Build JDTrainer or, as a reference, transformers' Trainer, on the same model and data; or `kind`."""
    hide_bars(training)
    set_seed(training.seed)  # The adapter's initial values depend on it.
    tokenizer = load_tokenizer(path, model)
    tokenized = {split: tokenize(rows, tokenizer, data, f"The split `{split}`") for split, rows in examples.items()}
    if training.label_names is None:
        training.label_names = ["labels"]  # PEFT's models hide the signature that Trainer reads them from.
    training.dataloader_pin_memory &= torch.accelerator.is_available()  # torch warns without one
    validation = tokenized.get("validation")
    if validation is None and (training.eval_strategy != IntervalStrategy.NO or not training.do_train):
        logger.warning("There is nothing to evaluate on: give --validation_file to see losses before and after.")
        training.eval_strategy, training.eval_on_start = IntervalStrategy.NO, False
    trainer = (kind or (Trainer if run.stock else JDTrainer))(
        model=load_model(path, model),
        args=training,
        train_dataset=tokenized["train"],
        eval_dataset=None if validation is None else _by_task(validation, data.task_column),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        processing_class=tokenizer,
        compute_metrics=token_metrics,
        preprocess_logits_for_metrics=answers,  # ty: ignore[invalid-argument-type]  # Trainer takes tuples, too
        callbacks=[StepTimer()] if run.time_steps else None,
    )
    use_console(trainer)
    return trainer


def _by_task(examples: Dataset, column: str | None) -> Any:
    """Split the evaluation set by task, to get a loss per task; without a task column, keep it whole."""
    if column is None:
        return examples
    tasks = np.array([str(task) for task in examples[column]])
    examples = examples.remove_columns(column)
    return {task: examples.select(np.flatnonzero(tasks == task)) for task in sorted(set(tasks.tolist()))}


def evaluate_at_the_end(trainer: Trainer) -> None:
    """Evaluate, unless the last step already has."""
    evaluations = measurements(trainer).evaluations.values()
    if trainer.eval_dataset is not None and all(series[-1][0] != trainer.state.global_step for series in evaluations):
        trainer.evaluate()


def measurements(trainer: Trainer) -> History:
    """Return what a trainer has logged."""
    return History().add(*trainer.state.log_history)


# ---- The folder of a run ----


def _how_to_resume(folder: Path) -> str:
    if not any(folder.glob("checkpoint-*")):
        return "Stopped before the first checkpoint (--save_steps): the same command starts over."
    return "Stopped. To continue from the newest checkpoint, add --resume_from_checkpoint last to the same command."


def _check_folder(folder: Path, run: RunArguments, training: TrainingArguments) -> None:
    """Refuse a folder with another run, which the flags neither resume nor replace."""
    if folder.is_file():
        raise ValueError(f"--output_dir {folder} is a file.")
    parts = _parts_of_a_run(folder)
    first = int(os.environ.get("RANK", "0")) == 0  # The others may come when it has begun to write.
    if first and parts and not training.resume_from_checkpoint and not run.overwrite_output_dir:
        raise ValueError(
            f"--output_dir {folder} holds another run ({parts[0].name}): choose another folder, continue that run "
            "with --resume_from_checkpoint last, or replace it with --overwrite_output_dir."
        )


def _parts_of_a_run(folder: Path) -> list[Path]:
    return [part for pattern in RUN for part in sorted(folder.glob(pattern))]


def _checkpoint(trainer: Trainer) -> str | None:
    """Return the checkpoint to resume from: a folder, or the run's newest complete one; None to start over."""
    wanted = trainer.args.resume_from_checkpoint
    if not wanted:
        return None
    needed = needed_files(trainer) if isinstance(trainer, JDTrainer) else trainer_files(trainer)
    return checkpoint_to_resume(trainer, wanted, needed)

"""`hf-jd finetune`: flags -> a trained model, its evaluation by task, and its card."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from hf_jd.finetune.measures import StepTimer, TokenLoss, answers, token_metrics
from hf_jd.finetune.model import load_model, load_tokenizer, model_path
from hf_jd.finetune.parser import Parser, names_of, read_settings, split_settings
from hf_jd.finetune.preflight import check_hub, check_launch, check_reporting, spread_over
from hf_jd.finetune.results import Results
from hf_jd.finetune.table import evaluation_table
from hf_jd.finetune.tokens import tokenize
from hf_jd.trainer.run.resuming import checkpoint_to_resume, needed_files, trainer_files

_FILES_OF_A_RUN = ("trainer_state.json", "adapter_config.json", "adapter_model.safetensors", "model.safetensors")
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
    flags, file = split_settings(argv)
    finetune(*parse(flags, {} if file is None else read_settings(file)))
    return 0


def parse(
    flags: Sequence[str],
    settings: Mapping[str, Any],
    command: str = "finetune",
    description: str = "Fine-tune a causal language model with Jacobian descent.",
) -> tuple[ModelArguments, DataArguments, RunArguments, JDTrainingArguments]:
    """Parse flags, which override settings by name.

    Args:
        flags: `--flag value ...`.
        settings: Values by the flags' names.
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
    )
    parser.set_defaults(**DEFAULTS)
    model, data, run, training = parser.parse(flags, settings)
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


def finetune(model: ModelArguments, data: DataArguments, run: RunArguments, training: JDTrainingArguments) -> Results:
    """Train, evaluate and save; without --do_train, only evaluate.

    Returns:
        The run's measurements.

    Raises:
        ValueError: Something is wrong with the data, the model or the folder; then nothing is left behind.
    """
    check_launch(training)
    check_reporting(training)
    check_hub(training)
    with _output_folder(run, training) as folder:
        path = model_path(model)
        trainer = build_trainer(path, model, data, run, training, load_examples(data))
        if not training.do_train:
            return _evaluate_only(trainer)
        facts = facts_of(path, model, data, run, training)
        trainer.add_callback(FactsWriter(folder, facts))
        if not training.resume_from_checkpoint and trainer.is_world_process_zero():
            _remove_run(folder)
        try:
            trainer.train(resume_from_checkpoint=_checkpoint(trainer))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_how_to_resume(folder)) from None
        evaluate_at_the_end(trainer)
        trainer.save_model()
        trainer.save_state()
    if trainer.is_world_process_zero():
        results = Results.read(folder)
        write_card(folder, path, data, facts, results)
        if results.evaluations:
            print(f"\n{evaluation_table(results)}")
        print(f"\nSaved in {folder}.")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # A process may abort if it exits within a gloo group.
    return Results.read(folder)


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
    tokenized = {split: tokenize(rows, tokenizer, data) for split, rows in examples.items()}
    if training.label_names is None:
        training.label_names = ["labels"]  # PEFT's models hide the signature that Trainer reads them from.
    training.dataloader_pin_memory &= torch.accelerator.is_available()  # torch warns without one
    validation = tokenized.get("validation")
    if validation is None and (training.eval_strategy != IntervalStrategy.NO or not training.do_train):
        logger.warning("There is nothing to evaluate on: give --validation_file to see losses before and after.")
        training.eval_strategy, training.eval_on_start = IntervalStrategy.NO, False
    spread_over(training, len(tokenized["train"]))
    trainer = (kind or (StockTrainer if run.stock else JacobianTrainer))(
        model=load_model(path, model),
        args=training,
        train_dataset=tokenized["train"],
        eval_dataset=None if validation is None else _by_task(validation, data.task_column),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        processing_class=tokenizer,
        compute_metrics=token_metrics,
        preprocess_logits_for_metrics=answers,  # ty: ignore[invalid-argument-type]  # Trainer takes tuples, too
        callbacks=[StepTimer(Path(training.output_dir or ""))] if run.time_steps else None,
    )
    use_console(trainer)
    return trainer


class StockTrainer(TokenLoss, Trainer):
    """Transformers' own trainer."""


class JacobianTrainer(TokenLoss, JDTrainer):
    """Our trainer."""


def _by_task(examples: Dataset, column: str | None) -> Any:
    """Split the evaluation set by task, to get a loss per task; without a task column, keep it whole."""
    if column is None:
        return examples
    rows: dict[str, list[int]] = {}
    for row, task in enumerate(examples[column]):
        rows.setdefault(str(task), []).append(row)
    examples = examples.remove_columns(column)
    return {task: examples.select(rows[task]) for task in sorted(rows)}


def evaluate_at_the_end(trainer: Trainer) -> None:
    """Evaluate, unless the last step already has."""
    evaluations = Results.of_log(trainer.state.log_history, steps=0).evaluations.values()
    evaluated = any(of_task[-1].step == trainer.state.global_step for of_task in evaluations)
    if trainer.eval_dataset is not None and not evaluated:
        trainer.evaluate()


def _evaluate_only(trainer: Trainer) -> Results:
    """Evaluate the model as it is, and save nothing."""
    if trainer.eval_dataset is None:
        raise ValueError("--do_train is false, but there is nothing to evaluate on: give --validation_file.")
    trainer.evaluate()
    results = Results.of_log(trainer.state.log_history, steps=0)
    if trainer.is_world_process_zero():
        print(f"\n{evaluation_table(results)}")
    return results


# ---- The folder of a run ----


def _how_to_resume(folder: Path) -> str:
    if not any(folder.glob("checkpoint-*")):
        return "Stopped before the first checkpoint (--save_steps): the same command starts over."
    return "Stopped. To continue from the newest checkpoint, add --resume_from_checkpoint last to the same command."


@contextmanager
def _output_folder(run: RunArguments, training: TrainingArguments) -> Generator[Path]:
    """Yield the run's folder; an error before anything is saved leaves it unchanged.

    Raises:
        ValueError: It holds another run, which the flags neither resume nor replace.
    """
    folder = Path(training.output_dir or "")
    existed = folder.exists()
    first = int(os.environ.get("RANK", "0")) == 0
    if existed and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file.")
    if first and existed and not training.resume_from_checkpoint:
        parts = _parts_of_a_run(folder)
        if parts and not run.overwrite_output_dir:
            raise ValueError(
                f"--output_dir {folder} holds another run ({parts[0].name}): choose another folder, continue that run "
                "with --resume_from_checkpoint last, or replace it with --overwrite_output_dir."
            )
    try:
        yield folder
    except ValueError:
        if first and not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


def _parts_of_a_run(folder: Path) -> list[Path]:
    files = [folder / name for name in _FILES_OF_A_RUN]
    return [*sorted(folder.glob("checkpoint-*")), *(file for file in files if file.exists())]


def _remove_run(folder: Path) -> None:
    for part in _parts_of_a_run(folder):
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def _checkpoint(trainer: Trainer) -> str | None:
    """Return the checkpoint to resume from: a folder, or the run's newest complete one; None to start over."""
    wanted = trainer.args.resume_from_checkpoint
    if not wanted:
        return None
    needed = needed_files(trainer) if isinstance(trainer, JDTrainer) else trainer_files(trainer)
    return checkpoint_to_resume(trainer, wanted, needed)

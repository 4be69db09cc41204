"""`hf-jd finetune`: flags -> a trained model, its evaluation by task, and its card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from hf_jd import JDTrainer, JDTrainingArguments
from hf_jd.finetune.arguments import DataArguments, ModelArguments, RunArguments
from hf_jd.finetune.card import write_card
from hf_jd.finetune.data import EXAMPLE_TASK_COLUMN, load_examples
from hf_jd.finetune.measures import StepTimer, predicted_tokens, token_metrics
from hf_jd.finetune.model import load_model, load_tokenizer, model_path
from hf_jd.finetune.parser import Parser, read_settings, split_settings
from hf_jd.finetune.results import Results
from hf_jd.finetune.table import evaluation_table
from hf_jd.finetune.tokens import tokenize
from hf_jd.trainer.resuming import checkpoint_to_resume, needed_files, trainer_files

_FILES_OF_A_RUN = ("trainer_state.json", "adapter_config.json", "adapter_model.safetensors", "model.safetensors")


def main(argv: Sequence[str]) -> int:
    """Runs `hf-jd finetune` with these arguments.

    Returns:
        The exit code.
    """
    flags, file = split_settings(argv)
    finetune(*parse(flags, {} if file is None else read_settings(file)))
    return 0


def parse(
    flags: Sequence[str], settings: Mapping[str, Any]
) -> tuple[ModelArguments, DataArguments, RunArguments, JDTrainingArguments]:
    """Parses flags, which override settings by name.

    Raises:
        ValueError: Something in them isn't allowed.
    """
    groups: Any = [ModelArguments, DataArguments, RunArguments, JDTrainingArguments]
    parser = Parser(
        groups,
        prog="hf-jd finetune",
        usage="%(prog)s [FILE.yaml] [--flag value ...]",
        description="Fine-tune a causal language model with Jacobian descent. The file holds flags as `name: value`.",
        allow_abbrev=False,
        prepare=_prepare,
    )
    model, data, run, training = parser.parse(flags, settings)
    return model, data, run, training


def _prepare(flags: dict[str, Any]) -> None:
    """Makes one of --task_column and --jd_group_column, which each stand for the other."""
    if flags["output_dir"] is None:
        raise ValueError("--output_dir is missing: where is the model to be saved?")
    task, group = flags["task_column"], flags["jd_group_column"]
    if task and group and task != group:
        raise ValueError(
            f"--task_column is `{task}` and --jd_group_column is `{group}`: they mean the same, so give one of them."
        )
    embedded = not flags["train_file"] and not flags["dataset_name"]
    flags["task_column"] = flags["jd_group_column"] = task or group or (EXAMPLE_TASK_COLUMN if embedded else None)


def finetune(model: ModelArguments, data: DataArguments, run: RunArguments, training: JDTrainingArguments) -> Results:
    """Trains, evaluates and saves.

    Returns:
        What was measured, read back from the run's own files.

    Raises:
        ValueError: Something is wrong with the data, the model or the folder; nothing is left behind then.
    """
    with _output_folder(run, training) as folder:
        path = model_path(model)
        examples = load_examples(data)
        trainer = build_trainer(path, model, data, run, training, examples)
        if not training.resume_from_checkpoint and trainer.is_world_process_zero():
            _remove_run(folder)
        trainer.train(resume_from_checkpoint=_checkpoint(trainer))
        _evaluate_at_the_end(trainer)
        trainer.save_model()
        trainer.save_state()
    if trainer.is_world_process_zero():
        results = Results.read(folder)
        write_card(folder, path, model, data, run, training, results)
        if results.evaluations:
            print(f"\n{evaluation_table(results)}")
        print(f"\nSaved in {folder}.")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # A process that ends in a group of gloo's may abort.
    return Results.read(folder)


def build_trainer(
    path: str,
    model: ModelArguments,
    data: DataArguments,
    run: RunArguments,
    training: JDTrainingArguments,
    examples: DatasetDict,
) -> Trainer:
    """JDTrainer or, as a reference, transformers' own, on the same model and data."""
    set_seed(training.seed)  # The adapter's initial values depend on it.
    tokenizer = load_tokenizer(path)
    tokenized = {split: tokenize(examples[split], tokenizer, data) for split in examples}
    if training.label_names is None:
        training.label_names = ["labels"]  # PEFT's models hide the signature that Trainer reads them from.
    training.dataloader_pin_memory &= torch.accelerator.is_available()  # Torch warns where it can't be done.
    validation = tokenized.get("validation")
    timers: list[Any] = [StepTimer(Path(training.output_dir or ""))] if run.time_steps else []
    return (Trainer if run.stock else JDTrainer)(
        model=load_model(path, model),
        args=training,
        train_dataset=tokenized["train"],
        eval_dataset=None if validation is None else _by_task(validation, data.task_column),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        processing_class=tokenizer,
        compute_metrics=token_metrics,
        preprocess_logits_for_metrics=predicted_tokens,
        callbacks=timers,
    )


def _by_task(examples: Dataset, column: str | None) -> Any:
    """One evaluation set for each task, whose losses are then its own; without a task column, the one set."""
    if column is None:
        return examples
    rows: dict[str, list[int]] = {}
    for row, task in enumerate(examples[column]):
        rows.setdefault(str(task), []).append(row)
    examples = examples.remove_columns(column)
    return {task: examples.select(rows[task]) for task in sorted(rows)}


def _evaluate_at_the_end(trainer: Trainer) -> None:
    """Evaluates, unless the last step did."""
    evaluated = any(
        name.endswith("_loss") and name.startswith("eval_") and entry["step"] == trainer.state.global_step
        for entry in trainer.state.log_history
        for name in entry
    )
    if trainer.eval_dataset is not None and not evaluated:
        trainer.evaluate()


# ---- The folder of a run ----


@contextmanager
def _output_folder(run: RunArguments, training: TrainingArguments) -> Generator[Path]:
    """The run's folder; where an error ends the run before anything was saved, it is as it was before.

    Raises:
        ValueError: It holds another run, and this one is neither to resume nor to replace that.
    """
    folder = Path(training.output_dir or "")
    existed = folder.exists()
    first = int(os.environ.get("RANK", "0")) == 0
    if existed and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file.")
    if first and existed and not training.resume_from_checkpoint:
        found = _parts_of_a_run(folder)
        if found and not run.overwrite_output_dir:
            raise ValueError(
                f"--output_dir {folder} holds another run ({found[0].name}): name another folder, continue that run "
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
    """The checkpoint to resume from: a folder, or the newest whole one of the run's own; None to start anew."""
    wanted = trainer.args.resume_from_checkpoint
    if not wanted:
        return None
    needed = needed_files(trainer) if isinstance(trainer, JDTrainer) else trainer_files(trainer)
    return checkpoint_to_resume(trainer, wanted.lower() in ("last", "true") or wanted, needed)

"""Load the data of a TRL command, and refuse what its trainer can't read before anything is tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from trl import get_dataset

from hf_jd.finetune.sentences import explained, first_sentence
from hf_jd.groups import group_names

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""The `datasets` builder for a local file, by its ending."""

COLUMNS = {
    "dpo": [("chosen", "rejected")],
    "reward": [("chosen", "rejected")],
    "kto": [("prompt", "completion", "label"), ("chosen", "rejected")],
    "grpo": [("prompt",)],
    "sft": [("messages",), ("conversations",), ("prompt", "completion")],
}
"""The columns that each command's trainer reads: one of these forms, or for SFT a text."""


def load(script: Any, mixture: Any) -> Any:
    """Load the data: a mixture, a dataset from the Hub or a folder, or a local file.

    Raises:
        ValueError: No data is given, it can't be read, or the file has an unknown ending.
    """
    if mixture.datasets:
        with explained("The mixture of `datasets` can't be read", OSError, ValueError, RuntimeError):
            return get_dataset(mixture)
    if not script.dataset_name:
        raise ValueError(
            "No data is given: set --dataset_name (on the Hub, a folder or a file), or `datasets` in YAML."
        )
    path = Path(script.dataset_name)
    if path.suffix in BUILDERS and not path.exists():
        raise ValueError(f"--dataset_name {path} can't be read: there is no such file.")
    unreadable = f"--dataset_name {path} can't be read"
    if not path.is_file():
        with explained(unreadable, OSError, ValueError, RuntimeError):
            return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    if path.suffix not in BUILDERS:
        raise ValueError(
            f"--dataset_name {path} ends in `{path.suffix}`; give a file that ends in {', '.join(BUILDERS)}."
        )
    try:
        return load_dataset(BUILDERS[path.suffix], data_files=str(path), streaming=script.dataset_streaming)
    except StopIteration as error:
        raise ValueError(f"{unreadable}: it is empty.") from error
    except (DatasetGenerationError, ValueError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ValueError(f"{unreadable}: {first_sentence(cause)}") from error


def split(data: Any, name: str, flag: str) -> Any:
    """Return a split of the data by its name; `flag` chooses it."""
    if name not in data:
        raise ValueError(f"The data has no split `{name}`; its splits are {', '.join(data)}: choose one with --{flag}.")
    return data[name]


def check_data(command: str, rows: Any, args: Any) -> None:
    """Raise a ValueError for texts that the trainer can't read, or without the group column, before tokenizing."""
    with explained("The data can't be read", OSError, ValueError, RuntimeError):
        first = next(iter(rows), None)
    if first is None:
        raise ValueError("The data has no rows: give at least one.")
    columns, forms = list(first), COLUMNS[command]
    if command == "sft":
        forms = [(args.dataset_text_field,), *forms]
    # In SFT, a prompt is always read with its completion; token ids have other names.
    usable = forms[-1:] if command == "sft" and "prompt" in columns else forms
    form = next((form for form in usable if {*form} <= {*columns}), ())
    if not form and not any(name.endswith("_ids") for name in columns):
        missing = [f"`{name}`" for name in usable[0] if name not in columns]
        raise ValueError(
            f"The data has no column {', '.join(missing)}; hf-jd {command} reads "
            f"{', or '.join(' + '.join(form) for form in forms)}, and the data has {', '.join(columns)}: rename its "
            "columns, or choose another command (`hf-jd --help`)."
        )
    if isinstance(rows, Dataset):
        _check_values(rows, form)
    from_pairs = command == "kto" and form == ("chosen", "rejected") and args.jd_group_column == "label"
    if args.jd_group_column and not from_pairs:  # KTO takes pairs apart, and labels them.
        group_names(rows, args.jd_group_column, args.jd_groups)


def _check_values(rows: Dataset, columns: Sequence[str]) -> None:
    """Raise a ValueError for columns of another type than their name says, or with missing values."""
    for name in columns:
        kind, is_label = rows.features[name], name == "label"
        is_text = isinstance(kind, Value) and "string" in kind.dtype
        if isinstance(kind, Value) and is_text == is_label:
            wanted = "true or false" if is_label else "a text or messages"
            raise ValueError(f"The column `{name}` of the data has to hold {wanted}, and is of type {kind.dtype}.")
        if rows.data.column(name).null_count:
            row = next(i for i, value in enumerate(rows[name]) if value is None)
            raise ValueError(
                f"Row {row} of the data has no value in the column `{name}`: fill it in, or leave the row out."
            )

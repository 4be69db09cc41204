"""Files and datasets -> checked rows, before anything expensive is loaded.

The readers of `datasets` won't do: its JSON reader turns texts that look like dates into timestamps, refuses files
whose columns differ, and can't say which line is malformed.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet
from datasets import load_dataset

from hf_jd.finetune.example import example_data
from hf_jd.finetune.flags import DataArguments
from hf_jd.finetune.formats import HELP, form_of, to_example
from hf_jd.finetune.sentences import first_sentence
from hf_jd.groups import is_missing

EXAMPLE_TASK_COLUMN = "task"

Rows = Sequence[Mapping[str, Any]]
"""A list, or a `Dataset`."""


def load_examples(data: DataArguments) -> dict[str, Any]:
    """Load the examples to train on (`train`) and, if there are any, to evaluate on (`validation`).

    Returns:
        Rows by split: lists, or `Dataset`s from the Hub.

    Raises:
        ValueError: A file or dataset can't be read or is empty, or its task column or texts are missing.
    """
    files = {"train": data.train_file, "validation": data.validation_file}
    splits: dict[str, Any] = {split: read_files(paths) for split, paths in files.items() if paths}
    if not splits:
        loaded: Any = _load_dataset(data.dataset_name, data) if data.dataset_name else example_data(data.example)
        splits = dict(loaded)
    for split, rows in splits.items():
        _check(rows, ", ".join(files[split] or ()) or f"The split `{split}`", data.task_column)
    return splits


def _load_dataset(name: str, data: DataArguments) -> dict[str, Any]:
    try:
        splits = load_dataset(name, data.dataset_config)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"The dataset `{name}` can't be loaded: {first_sentence(error)}") from error
    wanted = {"train": data.train_split, "validation": data.validation_split or "validation"}
    for split in wanted.values():
        if split not in splits and not (split == "validation" and data.validation_split is None):
            raise ValueError(f"The dataset `{name}` has no split `{split}`; it has {', '.join(map(str, splits))}.")
    return {split: splits[theirs] for split, theirs in wanted.items() if theirs in splits}


# ---- Files ----


def read_files(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Read the examples of files, folders and globs into memory.

    Raises:
        ValueError: A file is missing, unreadable, empty or malformed; the message names the line.
    """
    return [row for path in paths for file in _expand(path) for row in _read_file(file)]


def _expand(path: str) -> list[Path]:
    if Path(path).is_dir():
        files = [file for file in sorted(Path(path).iterdir()) if _suffix(file) in READERS]
        complaint = f"The folder {path} holds no file that ends in {', '.join(READERS)}."
    elif Path(path).exists() or not glob.has_magic(path):
        return [Path(path)]
    else:
        files, complaint = sorted(map(Path, glob.glob(path, recursive=True))), f"No file matches {path}."
    if not files:
        raise ValueError(complaint)
    return files


def _suffix(path: Path) -> str:
    """Return a file's ending, ignoring `.gz`."""
    return Path(path.name.removesuffix(".gz")).suffix


def _read_file(path: Path) -> Sequence[dict[str, Any]]:
    reader = READERS.get(_suffix(path))
    if reader is None:
        raise ValueError(
            f"{path} has an unknown ending `{path.suffix}`; use {', '.join(READERS)}, with or without .gz."
        )
    try:
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty.")
        return list(reader(path))
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8.") from error
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is malformed: {first_sentence(error)}") from error


def _open(path: Path) -> TextIO:
    opener: Callable[..., TextIO] = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    """Read an array of objects, or an object per line."""
    with _open(path) as file:
        text = file.read()
    array = text.lstrip().startswith("[")
    for line, part in enumerate([text] if array else text.split("\n"), 1):
        if not part.strip():
            continue
        try:
            value = json.loads(part)
        except json.JSONDecodeError as error:
            place = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
            raise ValueError(f"{place}: malformed JSON ({error.msg.removesuffix(' starting at')}).") from error
        for number, row in enumerate(value, 1) if array else [(line, value)]:
            if not isinstance(row, dict):
                place = f"{path}, {'example' if array else 'line'} {number}"
                raise ValueError(f"{place}: an example has to be an object with columns, not {json.dumps(row)}.")
            yield row


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    with _open(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{path}, line {reader.line_num}: the number of columns differs from line 1.")
                yield row
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: malformed CSV ({error}).") from error


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(path).to_pylist()


READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]] | list[dict[str, Any]]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# ---- Checks ----


def columns_of(rows: Rows) -> list[str]:
    """Return all columns that any row has."""
    return list(getattr(rows, "column_names", None) or dict.fromkeys(name for row in rows for name in row))


def _check(rows: Rows, source: str, task_column: str | None) -> None:
    """Raise a ValueError that lists the rows without text to learn, or without a task."""
    if len(rows) == 0:
        raise ValueError(f"{source} has no examples.")
    columns = columns_of(rows)
    form, listed = form_of(columns), ", ".join(f"`{name}`" for name in columns)
    if not form:
        advice = " Preferences are for `hf-jd dpo`." if {"chosen", "rejected"}.issubset(columns) else ""
        raise ValueError(f"{source} has nothing to learn from: it needs the columns {HELP}, and has {listed}.{advice}")
    if task_column and task_column not in columns:
        raise ValueError(
            f"{source} has no column `{task_column}`; its columns are {listed}. Choose the column of tasks with "
            "--task_column (or --jd_group_column)."
        )
    complaints: dict[str, list[int]] = {}
    for number, row in enumerate(rows, 1):
        if complaint := _complaint({name: row.get(name) for name in columns}, form, task_column):
            complaints.setdefault(complaint, []).append(number)
    for complaint, numbers in complaints.items():
        more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
        place = f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:5]))}{more}"
        raise ValueError(f"{source} has {complaint} of {place}: fill it in, or leave out such rows.")


def _complaint(row: Mapping[str, Any], form: tuple[str, ...], task_column: str | None) -> str:
    try:
        to_example(row, form)
    except ValueError as error:
        return str(error)
    missing = task_column and is_missing(row[task_column])
    return f"no value in the column `{task_column}`" if missing else ""

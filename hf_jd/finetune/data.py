"""Files and datasets -> rows, each a mapping from columns to values.

The readers of `datasets` won't do for files: its JSON reader turns texts that look like dates into timestamps, refuses
files whose columns differ, and can't say which line is malformed.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import load_dataset

from hf_jd.finetune.example import example_data
from hf_jd.finetune.flags import DataArguments
from hf_jd.finetune.sentences import explained

EXAMPLE_TASK_COLUMN = "task"

Rows = Sequence[Mapping[str, Any]]
"""A list, or a `Dataset`."""


def load_examples(data: DataArguments) -> dict[str, Any]:
    """Load the rows to train on (`train`) and, if there are any, to evaluate on (`validation`).

    Returns:
        Rows by split: lists, or `Dataset`s from the Hub.

    Raises:
        ValueError: A file or dataset can't be read or is empty.
    """
    if data.train_file:
        files = {"train": data.train_file, "validation": data.validation_file or []}
        return {split: read_files(paths) for split, paths in files.items() if paths}
    if not data.dataset_name:
        return {str(split): rows for split, rows in example_data(data.example).items()}
    with explained(f"The dataset `{data.dataset_name}` can't be loaded", OSError, ValueError, RuntimeError):
        splits: Any = load_dataset(data.dataset_name, data.dataset_config)
    wanted = {"train": data.train_split, "validation": data.validation_split or "validation"}
    if data.validation_split is None and "validation" not in splits:
        del wanted["validation"]
    if missing := [split for split in wanted.values() if split not in splits]:
        raise ValueError(
            f"The dataset `{data.dataset_name}` has no split `{missing[0]}`; it has {', '.join(map(str, splits))}."
        )
    return {split: splits[theirs] for split, theirs in wanted.items()}


def read_files(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Read the rows of files, folders and globs into memory.

    Raises:
        ValueError: A file is missing, unreadable, empty or malformed; the message names the line.
    """
    return [row for path in paths for file in _expand(path) for row in _read_file(file)]


def _expand(path: str) -> list[str]:
    """List the files that a path stands for."""
    pattern = str(Path(glob.escape(path)) / "*") if Path(path).is_dir() else path
    files = [path] if Path(path).is_file() else glob.glob(pattern, recursive=True)
    files = sorted(file for file in files if _ending(file) in READERS)
    if not files:
        raise ValueError(
            f"There is no file to read at {path}: give files, folders or globs of files that end in "
            f"{', '.join(READERS)}, with or without .gz."
        )
    return files


def _ending(path: str) -> str:
    return Path(path.removesuffix(".gz")).suffix


def _read_file(path: str) -> list[dict[str, Any]]:
    unreadable = explained(f"{path} can't be read", OSError, EOFError)
    with unreadable, explained(f"{path} is malformed", ValueError, csv.Error, pyarrow.ArrowException):
        rows = list(READERS[_ending(path)](path))
    if not rows:
        raise ValueError(f"{path} has no examples.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: example {number} has to be an object with columns, not {json.dumps(row)}.")
    return rows


def _open(path: str) -> Any:
    opener: Any = gzip.open if path.endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _read_json(path: str) -> Iterator[Any]:
    """Read an array of objects, or an object per line."""
    with _open(path) as file:
        text = file.read()
    array = text.lstrip().startswith("[") and path.removesuffix(".gz").endswith(".json")
    for line, part in enumerate([text] if array else text.split("\n"), 1):
        if part.strip():
            try:
                value = json.loads(part)
            except json.JSONDecodeError as error:
                place = f"line {line + error.lineno - 1} is not JSON from column {error.colno} on"
                raise ValueError(f"{place} ({error.msg.removesuffix(' starting at')})") from error
            yield from value if array else [value]


def _read_csv(path: str) -> Iterator[dict[str, Any]]:
    with _open(path) as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"the number of columns in line {reader.line_num} differs from line 1")
            yield row


def _read_parquet(path: str) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(path).to_pylist()


READERS: dict[str, Callable[[str], Iterator[Any] | list[Any]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

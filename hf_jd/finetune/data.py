"""Files and data sets -> examples, checked, before anything expensive is loaded."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict, load_dataset

from hf_jd.finetune.arguments import DataArguments
from hf_jd.finetune.example import example_data
from hf_jd.finetune.sentences import first_sentence
from hf_jd.groups import is_missing

EXAMPLE_TASK_COLUMN = "task"


def load_examples(data: DataArguments) -> DatasetDict:
    """Loads the examples to train on (`train`) and, where there are any, to evaluate on (`validation`).

    Raises:
        ValueError: A file or a data set can't be read or is empty, or its task column or texts are missing.
    """
    if data.train_file:
        files = {"train": data.train_file, "validation": data.validation_file}
        splits = DatasetDict({split: read_file(Path(path)) for split, path in files.items() if path})
    elif data.dataset_name:
        splits = _load_dataset(data.dataset_name, data)
    else:
        splits = example_data(data.example)
    for split, examples in splits.items():
        source = (data.validation_file if split == "validation" else data.train_file) or f"The split `{split}`"
        if len(examples) == 0:
            raise ValueError(f"{source} has no examples.")
        _check_texts(examples, source)
        if data.task_column:
            _check_column(examples, data.task_column, source)
    return splits


def _load_dataset(name: str, data: DataArguments) -> DatasetDict:
    try:
        found = load_dataset(name, data.dataset_config)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"The data set `{name}` can't be loaded: {first_sentence(error)}") from error
    wanted = {"train": data.train_split, "validation": data.validation_split or "validation"}
    for split in wanted.values():
        if split not in found and not (split == "validation" and data.validation_split is None):
            raise ValueError(f"The data set `{name}` has no split `{split}`; it has {', '.join(map(str, found))}.")
    return DatasetDict({split: found[own] for split, own in wanted.items() if own in found})


# ---- Files ----


def read_file(path: Path) -> Dataset:
    """Reads a file of examples into memory.

    Raises:
        ValueError: The file can't be read, is empty, or is malformed; the message has the line's number.
    """
    reader = READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"{path} has an unknown ending `{path.suffix}`; known are {', '.join(READERS)}.")
    try:
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty.")
        return reader(path)
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8.") from error
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is malformed: {first_sentence(error)}") from error


def _read_json(path: Path) -> Dataset:
    text = path.read_text("utf-8-sig")
    if not text.lstrip().startswith("["):
        return _read_json_lines(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: malformed JSON ({error.msg}).") from error
    return _from_rows(enumerate(rows, 1), f"{path}, example")


def _read_json_lines(path: Path) -> Dataset:
    def rows() -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: malformed JSON ({error.msg}).") from error

    return _from_rows(rows(), f"{path}, line")


def _read_csv(path: Path) -> Dataset:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        rows = []
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{path}, line {reader.line_num}: not as many columns as in the first line.")
                rows.append((reader.line_num, row))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: malformed CSV ({error}).") from error
        return _from_rows(iter(rows), f"{path}, line")


def _read_parquet(path: Path) -> Dataset:
    return Dataset(pyarrow.parquet.read_table(path))


def _from_rows(rows: Iterator[tuple[int, Any]], place: str) -> Dataset:
    columns: dict[str, list] = {}
    for before, (number, row) in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{place} {number}: an example has to be an object with columns, not {json.dumps(row)}.")
        for name in row:
            columns.setdefault(name, [None] * before)
        for name, values in columns.items():
            values.append(row.get(name))
    return Dataset.from_dict(columns)


READERS: dict[str, Callable[[Path], Dataset]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# ---- Checks ----


def text_columns(examples: Dataset) -> tuple[str, ...]:
    """The columns that hold the text: (`prompt`, `completion`), (`text`,), or none."""
    names = examples.column_names
    return next((pair for pair in (("prompt", "completion"), ("text",)) if set(pair) <= set(names)), ())


def _check_texts(examples: Dataset, source: str) -> None:
    columns = text_columns(examples)
    if not columns:
        raise ValueError(
            f"{source} has nothing to learn from: it needs the columns `prompt` and `completion`, or `text`, and has "
            f"{_listed(examples.column_names)}."
        )
    for name in columns:
        rows = [row for row, value in enumerate(examples[name], 1) if not isinstance(value, str)]
        if rows:
            raise ValueError(f"{source} has no text in the column `{name}` of {_numbered(rows)}.")


def _check_column(examples: Dataset, column: str, source: str) -> None:
    if column not in examples.column_names:
        raise ValueError(
            f"{source} has no column `{column}`; its columns are {_listed(examples.column_names)}. Name the "
            "one of the tasks with --task_column (or --jd_group_column)."
        )
    rows = [row for row, value in enumerate(examples[column], 1) if is_missing(value)]
    if rows:
        raise ValueError(
            f"{source} has no value in the column `{column}` of {_numbered(rows)}: fill it in, or leave them out."
        )


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _numbered(rows: list[int]) -> str:
    """Row numbers, counted from 1, of which the first are listed."""
    listed = ", ".join(map(str, rows[:5]))
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"row{'s' if len(rows) > 1 else ''} {listed}{more}"

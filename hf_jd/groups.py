"""Whose group is each example? The names that a dataset of any kind has in its group column."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

DATASET_COLUMN = "dataset_name"
"""The column in which sentence-transformers tells several datasets apart, given as a dict of them."""


def is_missing(value: Any) -> bool:
    """Whether a dataset's value is no value: None, NaN, pandas' NA and NaT, or an empty string."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value) or type(value).__name__ in ("NAType", "NaTType")


def as_list(value: Any) -> list[Any]:
    """A group column's value as Python's own values: one, or those of the documents that an example packs."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [one for part in value for one in as_list(part)]
    return [value]


def name_of(value: Any) -> str:
    """A group's name: the text of a value, which is the same for 2 and 2.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def has_column(example: Any, column: str) -> bool:
    """Whether an example has a column, as its key or its attribute."""
    return column in example if isinstance(example, Mapping) else hasattr(example, column)


def group_of(example: Any, column: str) -> Any:
    """What an example has in a column."""
    return example[column] if isinstance(example, Mapping) else getattr(example, column)


def group_names(dataset: Any, column: str, known: list[str] | None = None) -> list[str] | None:
    """The names of all groups of a training set, sorted, so that every process gives them the same ids.

    Args:
        dataset: A Dataset, a list of examples, a stream, or several of them by name.
        column: The name of the group column.
        known: The names, if the user has listed them; then no example is read.

    Returns:
        The names; None for a stream, whose values are only known as they come.

    Raises:
        ValueError: The column doesn't exist, or an example has no value in it.
    """
    if isinstance(dataset, Mapping):
        if column == DATASET_COLUMN:
            return sorted(dataset)
        each = [group_names(part, column, known) for part in dataset.values()]
        return None if any(names is None for names in each) else sorted({n for names in each for n in names or []})
    columns = getattr(dataset, "column_names", None)
    if columns is not None and column not in columns and not _has_transform(dataset):
        raise _missing_column(column, columns)
    if known or not hasattr(dataset, "__len__"):
        return known
    return sorted({name for names in groups_of_each(dataset, column) for name in names})


def groups_of_each(dataset: Any, column: str) -> list[list[str]]:
    """The names of each example's groups: one, or those of the documents that it packs.

    Args:
        dataset: A Dataset or a list of examples.
        column: The name of the group column.

    Raises:
        ValueError: The column doesn't exist, or an example has no value in it.
    """
    values = _column(dataset, column)
    if values is None:
        with _same_random_numbers():
            values = _read(dataset, column)
    names = []
    for row, value in enumerate(values):
        found = as_list(value)
        if any(is_missing(name) for name in found):
            raise ValueError(
                f"Row {row} of the training set has no value in the group column `{column}`: fill it in, or leave "
                "the row out."
            )
        names.append([name_of(name) for name in found])
    return names


def _column(dataset: Any, column: str) -> Sequence[Any] | None:
    """A column, where a dataset has it without making an example: no image is read, nothing is drawn at random.

    A table of Hugging Face is read without its transform. Any other dataset may have the column as an attribute, or
    as a method without arguments.
    """
    if isinstance(dataset, Subset):
        whole = _column(dataset.dataset, column)
        return None if whole is None else [whole[int(i)] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_column(part, column) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [v for part in parts if part is not None for v in part]
    if hasattr(dataset, "with_format") and hasattr(dataset, "column_names"):
        return list(dataset.with_format(None)[column]) if column in dataset.column_names else None
    offered = getattr(dataset, column, None)
    if inspect.ismethod(offered) and not _required(offered):
        offered = offered()
    if isinstance(offered, str | Mapping) or not hasattr(offered, "__len__") or len(offered) != len(dataset):
        return None
    return list(offered)


def _has_transform(dataset: Any) -> bool:
    """Whether a table's examples are made by a function of the user's, which may give them more columns."""
    form = getattr(dataset, "format", None)
    return isinstance(form, Mapping) and form.get("type") == "custom"


def _required(method: Any) -> list[str]:
    """The names of the arguments that a method can't be called without."""
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(method).parameters.values()
    return [p.name for p in found if p.default is inspect.Parameter.empty and p.kind not in free]


def _read(dataset: Any, column: str) -> list[Any]:
    """A column from the examples, one by one."""
    values = []
    for row in range(len(dataset)):
        example = dataset[row]
        if not has_column(example, column):
            named = list(example) if isinstance(example, Mapping) else sorted(getattr(example, "__dict__", {}))
            raise _missing_column(column, named)
        values.append(group_of(example, column))
    return values


@contextmanager
def _same_random_numbers() -> Generator[None]:
    """Reads examples whose transforms may be random, and leaves the streams of random numbers as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _missing_column(column: str, columns: Iterable[str]) -> ValueError:
    listed = ", ".join(f"`{name}`" for name in columns)
    return ValueError(
        f"The training set has no group column `{column}`; its columns are {listed}: name one of them with "
        "--jd_group_column."
    )

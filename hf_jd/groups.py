"""Read the group names of examples, from the group column of any kind of dataset."""

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
"""The column that sentence-transformers adds to tell the datasets of a dict apart."""


def is_missing(value: Any) -> bool:
    """Return whether a value counts as missing: None, NaN, pandas' NA and NaT, or an empty string."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value) or type(value).__name__ in ("NAType", "NaTType")


def as_list(value: Any) -> list[Any]:
    """Convert a group column's value to a list of Python values: one, or one per packed document."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [one for part in value for one in as_list(part)]
    return [value]


def name_of(value: Any) -> str:
    """Return a group's name: the value as text, the same for 2 and 2.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def has_column(example: Any, column: str) -> bool:
    """Return whether an example has a column, as a key or an attribute."""
    return column in example if isinstance(example, Mapping) else hasattr(example, column)


def group_of(example: Any, column: str) -> Any:
    """Return an example's value in a column."""
    return example[column] if isinstance(example, Mapping) else getattr(example, column)


def group_names(dataset: Any, column: str, listed: list[str] | None = None) -> list[str] | None:
    """Return the names of all groups of a training set, sorted, so that every process gives them the same ids.

    Args:
        dataset: A Dataset, a list of examples, a stream, or a dict of these.
        column: The name of the group column.
        listed: The names, if the user has listed them; then no example is read.

    Returns:
        The names; None for a stream, whose values only appear as they come.

    Raises:
        ValueError: The column doesn't exist, or an example has no value in it.
    """
    if isinstance(dataset, Mapping):
        if column == DATASET_COLUMN:
            return sorted(dataset)
        each = [group_names(part, column, listed) for part in dataset.values()]
        return None if any(names is None for names in each) else sorted({n for names in each for n in names or []})
    columns = getattr(dataset, "column_names", None)
    if columns is not None and column not in columns and not _has_transform(dataset):
        raise _missing_column(column, columns)
    if listed or not hasattr(dataset, "__len__"):
        return listed
    return sorted({name for names in groups_of_each(dataset, column) for name in names})


def groups_of_each(dataset: Any, column: str) -> list[list[str]]:
    """Return the names of each example's groups: one, or one per packed document.

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
        groups = as_list(value)
        if any(is_missing(name) for name in groups):
            raise ValueError(
                f"Row {row} of the training set has no value in the group column `{column}`: fill it in, or leave "
                "the row out."
            )
        names.append([name_of(name) for name in groups])
    return names


def _column(dataset: Any, column: str) -> Sequence[Any] | None:
    """Return a column that a dataset offers without building examples: without reading images or drawing at random.

    A Hugging Face table is read without its transform. Any other dataset may have the column as an attribute, or as a
    method without arguments.
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
    """Return whether a table's examples are built by the user's function, which may add columns."""
    form = getattr(dataset, "format", None)
    return isinstance(form, Mapping) and form.get("type") == "custom"


def _required(method: Any) -> list[str]:
    """Return the names of a method's required arguments."""
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(method).parameters.values()
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in free]


def _read(dataset: Any, column: str) -> list[Any]:
    """Read a column from the examples, one by one."""
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
    """Restore the random streams on exit: reading examples may run random transforms."""
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
        f"The training set has no group column `{column}`; its columns are {listed}: choose one of them with "
        "--jd_group_column."
    )

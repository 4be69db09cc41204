"""Group columns, from a dataset of any kind to the ids of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import torch

GROUP_KEY = "jd_group"
"""The batch's key of the group ids, [B] int64."""

EXAMPLES_KEY = "jd_examples"
"""The batch's key of a tensor [B], which tells how many examples were collated."""


def is_missing(value: Any) -> bool:
    """Whether a dataset's value is no value: None, NaN or an empty string."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


class GroupCollator:
    """Wraps a collator: takes the group column out of the examples, and adds the groups' ids to the batch.

    Collators drop string columns or fail on them, so the names never reach the inner one.

    Args:
        collator: The collator of everything else.
        column: The name of the group column.
        names: All groups' names, in the order of their ids. None: the column holds integers, which are the ids.
    """

    def __init__(self, collator: Callable[[list], Any], column: str, names: Sequence[str] | None):
        self.collator = collator
        self.column = column
        self.ids = None if names is None else {name: i for i, name in enumerate(names)}

    def __call__(self, examples: list) -> Any:
        """Collates; ids [B] are -1 for a name that isn't known, and absent for examples without the column.

        An example that packs several documents has a list of their names; then there is one id a document.
        """
        if not all(isinstance(example, dict) and self.column in example for example in examples):
            return self.collator(examples)
        values = [name for example in examples for name in _each(example[self.column])]
        batch = self.collator([{k: v for k, v in example.items() if k != self.column} for example in examples])
        if not isinstance(batch, MutableMapping):
            raise ValueError(
                f"The collator returns a {type(batch).__name__}, to which no groups can be added, as it does for TRL's "
                f"GRPO and RLOO: leave out --jd_group_column {self.column}, or use a collator that returns a dict."
            )
        batch[GROUP_KEY] = torch.tensor([self._id(value) for value in values], dtype=torch.int64)
        return batch

    def _id(self, value: Any) -> int:
        if is_missing(value):
            return -1
        if self.ids is not None:
            return self.ids.get(str(value), -1)
        try:
            return int(value)
        except ValueError:
            raise ValueError(
                f"The group column `{self.column}` holds names, such as `{value}`, and a stream's names can't be known "
                "beforehand: list them with --jd_groups."
            ) from None


class ExampleCounter:
    """Wraps a collator: adds the number of examples, which the collator may have made several rows of each.

    Args:
        collator: The collator of everything else.
    """

    def __init__(self, collator: Callable[[list], Any]):
        self.collator = collator

    def __call__(self, examples: list) -> Any:
        """Collates; what isn't a dict stays as it is."""
        batch = self.collator(examples)
        if isinstance(batch, MutableMapping):
            batch[EXAMPLES_KEY] = torch.zeros(len(examples), dtype=torch.int64)
        return batch


def group_names(dataset: Any, column: str, known: list[str] | None = None) -> list[str] | None:
    """The names of all groups of a training set, sorted, so that every process gives them the same ids.

    Args:
        dataset: A Dataset, a list of examples, or a stream.
        column: The name of the group column.
        known: The names, if the user has listed them; then no example is read.

    Returns:
        The names; None for a stream, whose values are only known as they come.

    Raises:
        ValueError: The column doesn't exist, or an example has no value in it.
    """
    columns = getattr(dataset, "column_names", None)
    if columns is not None and column not in columns:
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
    names = []
    for row, value in enumerate(_values(dataset, column, getattr(dataset, "column_names", None))):
        if any(is_missing(name) for name in _each(value)):
            raise ValueError(
                f"Row {row} of the training set has no value in the group column `{column}`: fill it in, or leave "
                "the row out."
            )
        names.append([str(name) for name in _each(value)])
    return names


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _values(dataset: Any, column: str, columns: list[str] | None) -> Iterable[Any]:
    if columns is not None:
        yield from dataset[column]
        return
    for row in range(len(dataset)):
        example = dataset[row]
        if column not in example:
            raise _missing_column(column, list(example))
        yield example[column]


def _missing_column(column: str, columns: list[str]) -> ValueError:
    listed = ", ".join(f"`{name}`" for name in columns)
    return ValueError(
        f"The training set has no group column `{column}`; its columns are {listed}: name one of them with "
        "--jd_group_column."
    )

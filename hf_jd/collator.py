"""The collator of batches with groups: takes the group column out of the examples, and adds the groups' ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import copy
from typing import Any

import torch

from hf_jd.groups import as_list, group_of, has_column, is_missing, name_of

GROUP_KEY = "jd_group"
"""The batch's key of the group ids, [B] int64."""

EXAMPLES_KEY = "jd_examples"
"""The batch's key of a tensor [B], which tells how many examples were collated."""


class _Wrapped:
    """A collator around another one, whose attributes it shows: trainers ask theirs, and save its tokenizer."""

    collator: Callable[[list], Any]

    def __getattr__(self, name: str) -> Any:
        if name == "collator" or name.startswith("__"):  # While a worker unpickles, there is none yet.
            raise AttributeError(name)
        return getattr(self.collator, name)


class GroupCollator(_Wrapped):
    """Wraps a collator: takes the group column out of the examples, and adds the groups' ids to the batch.

    Collators drop string columns or fail on them, so they don't meet the names, unless they ask for that column.

    Args:
        collator: The collator of everything else.
        column: The name of the group column.
        names: All groups' names, in the order of their ids. None: the column holds integers, which are the ids.
        keep: Whether the column is one that the model takes, as its labels are, and stays in the examples.
    """

    def __init__(self, collator: Callable[[list], Any], column: str, names: Sequence[str] | None, keep: bool = False):
        self.collator = collator
        self.column = column
        self.keep = keep
        self.ids = None if names is None else {name: i for i, name in enumerate(names)}

    def __call__(self, examples: list) -> Any:
        """Collates; ids [B] are -1 for a name that isn't known, and absent for examples without the column.

        An example that packs several documents has a list of their names; then there is one id a document.
        """
        if not all(has_column(example, self.column) for example in examples):
            return self.collator(examples)
        values = [name for example in examples for name in as_list(group_of(example, self.column))]
        batch = self.collator(examples if self.keep else [_without(example, self.column) for example in examples])
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"The collator returned a {type(batch).__name__}, which has no place for the ids of the groups of "
                "--jd_group_column: return a dict of tensors by name."
            )
        ids = torch.tensor([self._id(value) for value in values], dtype=torch.int64)
        if isinstance(batch, MutableMapping):
            batch[GROUP_KEY] = ids
            return batch
        return {**batch, GROUP_KEY: ids}

    def _id(self, value: Any) -> int:
        if is_missing(value):
            return -1
        name = name_of(value)
        if self.ids is not None:
            return self.ids.get(name, -1)
        if isinstance(value, bool):
            return int(value)
        if not name.isdecimal():
            raise ValueError(
                f"The group column `{self.column}` holds names, such as `{name}`, and a stream's names can't be known "
                "beforehand: list them with --jd_groups."
            )
        return int(name)


class ExampleCounter(_Wrapped):
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


class _WithoutColumn(dict):
    """An example that doesn't show its group column, but answers who asks for it: a collator may make labels of it."""

    def __init__(self, example: Mapping[str, Any], column: str):
        super().__init__((key, value) for key, value in example.items() if key != column)
        self.column = (column, example[column])

    def __missing__(self, key: str) -> Any:
        column, value = self.column
        if key != column:
            raise KeyError(key)
        return value


def _without(example: Any, column: str) -> Any:
    """Copy an example without its group column, if that can be taken out."""
    if isinstance(example, dict):
        return _WithoutColumn(example, column)
    if isinstance(example, MutableMapping):
        example = copy(example)
        del example[column]
        return example
    if isinstance(example, Mapping):
        return {key: value for key, value in example.items() if key != column}
    if column in getattr(example, "__dict__", {}):
        example = copy(example)
        del example.__dict__[column]  # Past what a frozen dataclass forbids.
    return example

"""Collate batches with groups: remove the group column from the examples, and add the groups' ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import copy
from typing import Any

import torch

from hf_jd.groups import as_list, group_of, has_column, is_missing, name_of

GROUP_KEY = "jd_group"
"""The batch's key for the group ids, [B] int64."""

EXAMPLES_KEY = "jd_examples"
"""The batch's key for a tensor [B], whose length is the number of collated examples."""


class _Wrapped:
    """A collator that wraps another one and forwards its attributes: trainers read them, and save its tokenizer."""

    collator: Callable[[list], Any]

    def __getattr__(self, name: str) -> Any:
        if name == "collator" or name.startswith("__"):  # not set yet while a worker unpickles
            raise AttributeError(name)
        return getattr(self.collator, name)


class GroupCollator(_Wrapped):
    """A collator around another one: removes the group column from the examples, and adds the groups' ids to the batch.

    Collators drop string columns or fail on them, so the column is hidden, unless a collator asks for it by name.

    Args:
        collator: The collator for everything else.
        column: The name of the group column.
        names: All groups' names, in the order of their ids. None: the column holds integer ids.
        keep: Whether the column stays in the examples, because the model takes it, too, as labels for example.
    """

    def __init__(self, collator: Callable[[list], Any], column: str, names: Sequence[str] | None, keep: bool = False):
        self.collator = collator
        self.column = column
        self.keep = keep
        self.ids = None if names is None else {name: i for i, name in enumerate(names)}

    def __call__(self, examples: list) -> Any:
        """Collate; ids [B] are -1 for an unknown name, and absent for examples without the column.

        An example that packs several documents has a list of their names, and gets one id per document.
        """
        if not all(has_column(example, self.column) for example in examples):
            return self.collator(examples)
        values = [name for example in examples for name in as_list(group_of(example, self.column))]
        batch = self.collator(examples if self.keep else [_without(example, self.column) for example in examples])
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"The collator returned a {type(batch).__name__}, which can't hold the group ids of "
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
                "in advance: list them with --jd_groups."
            )
        return int(name)


class ExampleCounter(_Wrapped):
    """A collator around another one: adds the number of examples, since that one may make several rows of each.

    Args:
        collator: The collator of everything else.
    """

    def __init__(self, collator: Callable[[list], Any]):
        self.collator = collator

    def __call__(self, examples: list) -> Any:
        """Collate; leave a batch that isn't a dict unchanged."""
        batch = self.collator(examples)
        if isinstance(batch, MutableMapping):
            batch[EXAMPLES_KEY] = torch.zeros(len(examples), dtype=torch.int64)
        return batch


class _WithoutColumn(dict):
    """An example with a hidden group column, still readable by name: a collator may make labels of it."""

    def __init__(self, example: Mapping[str, Any], column: str):
        super().__init__((key, value) for key, value in example.items() if key != column)
        self.column = (column, example[column])

    def __missing__(self, key: str) -> Any:
        column, value = self.column
        if key != column:
            raise KeyError(key)
        return value


def _without(example: Any, column: str) -> Any:
    """Copy an example without its group column, if that can be removed."""
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
        del example.__dict__[column]  # works for a frozen dataclass, too
    return example

"""A batch as collated: whether it holds examples, how many, and the batch without some of them.

Tensors may be nested in mappings, lists and tuples, next to flags, numbers, strings and None.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from copy import copy
from typing import Any

import numpy as np
from torch import Tensor

from hf_jd.collator import EXAMPLES_KEY, GROUP_KEY
from hf_jd.packing import unknown_rows, without_documents


def group_ids(batch: Any) -> Tensor | None:
    """Return the group ids of the examples [B], if the batch has them."""
    return batch.get(GROUP_KEY) if isinstance(batch, Mapping) else None


def without_groups(batch: Any) -> Any:
    """Return the batch without the keys that `hf_jd.collator` has added, in the same type if that is mutable."""
    keys = [key for key in (GROUP_KEY, EXAMPLES_KEY) if isinstance(batch, Mapping) and key in batch]
    if not keys:
        return batch
    if not isinstance(batch, MutableMapping):
        return {key: value for key, value in batch.items() if key not in keys}
    batch = copy(batch)
    for key in keys:
        del batch[key]
    return batch


def holds_examples(batch: Any) -> bool:
    """Return whether a batch may hold examples: not if all of its tensors are empty.

    A batch without tensors is passed on as it is, since we can't interpret it.
    """
    sized = list(_sized(without_groups(batch)))
    return not sized or any(math.prod(leaf.shape) for leaf in sized)


def row_count(batch: Any) -> int | None:
    """Estimate the number of instances before their losses are known: the most common first dimension.

    None if the batch has no tensor.
    """
    groups = group_ids(batch)
    sizes = Counter(len(leaf) for leaf in _sized(batch))
    return len(groups) if groups is not None else sizes.most_common(1)[0][0] if sizes else None


def stand_in(batch: Any) -> Any:
    """Return a batch of one example in place of an empty batch [0, ...]: zeros, except for masks of ones."""

    def one(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        sizes = [max(1, size) for size in value.shape]
        return value.new_ones(sizes) if "mask" in key else value.new_zeros(sizes)

    return _rebuilt(without_groups(batch), one)


def selected(batch: Any, keep: Tensor, documents: Tensor | None = None) -> Any:
    """Return the batch with only some of its instances or packed documents.

    Args:
        batch: As collated.
        keep: [B] (bool), by instance; or [D], by document.
        documents: See `packed_documents`.

    Raises:
        ValueError: It holds rows that can't be assigned to instances, such as several images per example.
    """
    if documents is not None:
        return without_documents(batch, documents, keep.to(documents.device))
    keep = keep.cpu()
    indices, instances = keep.nonzero().flatten(), f"{len(keep)} instances"

    def select(key: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            if len(value) != len(keep):
                return value  # rebuilt part by part
            if all(isinstance(part, Tensor) and part.ndim and len(part) == len(keep) for part in value):
                raise unknown_rows(key, f"{len(value)} tensors of {len(value)} rows each", instances)
            return type(value)(value[i] for i in indices.tolist())
        if not isinstance(value, Tensor | np.ndarray) or not value.ndim:
            return value
        # positions of every token in time, height and width
        dim = 1 if key == "position_ids" and value.ndim == 3 else 0
        size = value.shape[dim]
        if size not in (1, len(keep)):
            raise unknown_rows(key, f"shape {list(value.shape)}", instances)
        if size != len(keep):
            return value  # one row for all instances
        if isinstance(value, Tensor):
            return value.index_select(dim, indices.to(value.device))
        return value.take(indices.numpy(), axis=dim)

    return _rebuilt(batch, select)


def _rebuilt(value: Any, convert: Callable[[str, Any], Any], key: str = "") -> Any:
    """Rebuild nested mappings, lists and tuples with `convert` applied to each key's value.

    A list or tuple that `convert` returns unchanged is rebuilt part by part.
    """
    if isinstance(value, Mapping):
        rebuilt = {k: _rebuilt(v, convert, str(k)) for k, v in value.items()}
        return rebuilt if type(value) is dict else type(value)(rebuilt)
    changed = convert(key, value)
    if changed is value and isinstance(value, list | tuple):
        return type(value)(_rebuilt(part, convert, key) for part in value)
    return changed


def _sized(value: Any) -> Iterator[Any]:
    """Yield the nested tensors and arrays, except scalars."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _sized(part)
    elif isinstance(value, Tensor | np.ndarray) and value.ndim:
        yield value

"""A batch as a collator made it: is there any example in it, how many, and what is it without some of them?

Tensors may lie in mappings, lists and tuples of any depth, beside flags, numbers, strings and None.
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
    """The ids of its examples' groups [B], if it has them."""
    return batch.get(GROUP_KEY) if isinstance(batch, Mapping) else None


def without_groups(batch: Any) -> Any:
    """The batch without what `hf_jd.collator` has added, of the same type where that can be changed."""
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
    """Whether there may be an example in a batch: not where it has tensors, and all of them are empty.

    A batch without any tensor is none that we understand: it is passed on as it is.
    """
    sized = list(_sized(without_groups(batch)))
    return not sized or any(math.prod(leaf.shape) for leaf in sized)


def row_count(batch: Any) -> int:
    """An estimate of how many instances there are, before their losses tell: the first size that most tensors have."""
    groups = group_ids(batch)
    sizes = Counter(len(leaf) for leaf in _sized(batch))
    return len(groups) if groups is not None else sizes.most_common(1)[0][0] if sizes else 1


def stand_in(batch: Any) -> Any:
    """One example, of zeros, for a batch [0, ...] of none; masks are of ones, for something to attend to."""

    def one(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        sizes = [max(1, size) for size in value.shape]
        return value.new_ones(sizes) if "mask" in key else value.new_zeros(sizes)

    return _rebuilt(without_groups(batch), one)


def selected(batch: Any, keep: Tensor, documents: Tensor | None = None) -> Any:
    """The batch with some of its instances or packed documents only.

    Args:
        batch: As collated.
        keep: [B] (bool), by instance; or [D], by document.
        documents: See `packed_documents`.

    Raises:
        ValueError: It holds rows of which it isn't known whose they are, such as images of which an example has
            several.
    """
    if documents is not None:
        return without_documents(batch, documents, keep.to(documents.device))
    keep = keep.cpu()
    indices, instances = keep.nonzero().flatten(), f"{len(keep)} instances"

    def of(key: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            if len(value) != len(keep):
                return value  # Part by part.
            if all(isinstance(part, Tensor) and part.ndim and len(part) == len(keep) for part in value):
                raise unknown_rows(key, f"{len(value)} tensors of {len(value)} rows each", instances)
            return type(value)(value[i] for i in indices.tolist())
        if not isinstance(value, Tensor | np.ndarray) or not value.ndim:
            return value
        # Positions in time, height and width, one of each for every token.
        dim = 1 if key == "position_ids" and value.ndim == 3 else 0
        size = value.shape[dim]
        if size not in (1, len(keep)):
            raise unknown_rows(key, f"shape {list(value.shape)}", instances)
        if size != len(keep):
            return value  # One row for all.
        if isinstance(value, Tensor):
            return value.index_select(dim, indices.to(value.device))
        return value.take(indices.numpy(), axis=dim)

    return _rebuilt(batch, of)


def _rebuilt(value: Any, of: Callable[[str, Any], Any], key: str = "") -> Any:
    """The same mappings, lists and tuples, of what `of` makes of each key's value.

    A list or tuple that it returns as it was is rebuilt part by part.
    """
    if isinstance(value, Mapping):
        made = {k: _rebuilt(v, of, str(k)) for k, v in value.items()}
        return made if type(value) is dict else type(value)(made)
    made = of(key, value)
    if made is value and isinstance(value, list | tuple):
        return type(value)(_rebuilt(part, of, key) for part in value)
    return made


def _sized(value: Any) -> Iterator[Any]:
    """The tensors and arrays at any depth, but for single numbers."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _sized(part)
    elif isinstance(value, Tensor | np.ndarray) and value.ndim:
        yield value

"""Packed sequences: find the document of each token in a row that holds several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PACKED = ("auto", "always", "never")
"""When to treat rows as packed: if the batch says so clearly, at every hint, and never."""

_TELLING = ("cu_seq_lens_q", "seq_idx", "position_ids")


def packed_documents(batch: Any, packed: str = "auto") -> Tensor | None:
    """Return the document of each token, numbered over all rows, if a row holds more than one.

    Documents are read from what packing collators write: `cu_seq_lens_q`, `seq_idx`, or `position_ids` that restart.
    With "auto", positions alone count only if each one either grows by 1 or restarts, and if no `attention_mask` lets
    the documents of several rows attend to each other. With "always", a document begins wherever positions don't grow
    by 1, or, with a mask, where they don't grow; padding belongs to no document.

    Args:
        batch: As collated.
        packed: One of `PACKED`.

    Returns:
        [B, T], -1 for padding; None if no row is packed.
    """
    tokens = _tokens(batch) if packed != "never" else None
    if tokens is None:
        return None
    shape, device = tokens.shape[:2], tokens.device
    bounds, index, positions, mask = (
        torch.as_tensor(batch[key], device=device) if batch.get(key) is not None else None
        for key in (*_TELLING, "attention_mask")
    )
    real = mask.bool() if mask is not None and mask.shape == shape else None
    if bounds is not None and shape[0] == 1 and bounds.flatten()[-1] <= shape[1]:
        begins = torch.zeros(shape, dtype=torch.bool, device=device)
        ends = bounds.flatten()[1:]
        begins[0, ends[ends < shape[1]].long()] = True
        padding = torch.arange(shape[1], device=device)[None] >= ends[-1]
        real = ~padding if real is None else real & ~padding
    elif index is not None and index.shape == shape:
        begins = index.diff(prepend=index[:, :1] - 1) != 0
    elif positions is not None and positions.shape == shape:
        if packed == "auto" and not _begin_again(positions, real, masked=mask is not None):
            return None
        step = positions.diff(prepend=positions[:, :1] - 1)
        begins = step != 1 if real is None else (step < 1) | _first(real)
    else:
        return None
    begins[:, 0] = True
    if real is not None:
        begins = begins & real
    if int(begins.sum(1).max()) < 2:
        return None
    documents = begins.flatten().cumsum(0).view(shape) - 1
    return documents if real is None else documents.masked_fill(~real, -1)


def documents_of(batch: Any, packed: str) -> Tensor | None:
    """Return `packed_documents`; with "always", check that the batch marks its documents.

    Raises:
        ValueError: The batch has to be packed, but doesn't say where documents begin.
    """
    if packed == "always":
        _check_marked(batch)
    return packed_documents(batch, packed)


def _check_marked(batch: Any) -> None:
    """Raise a ValueError if the batch doesn't say where documents begin."""
    if not isinstance(batch, Mapping) or all(batch.get(key) is None for key in _TELLING):
        raise ValueError(
            "--jd_packed is `always`, but nothing in the batch tells where a document begins: use a collator that "
            "returns `position_ids` [B, T] that restart with each document, `seq_idx` [B, T] or `cu_seq_lens_q`; "
            "or --jd_packed auto."
        )


def _tokens(batch: Any) -> Tensor | None:
    """Return the tensor of tokens, [B, T, ...]."""
    if not isinstance(batch, Mapping):
        return None
    tokens = next((batch[key] for key in ("input_ids", "inputs_embeds") if batch.get(key) is not None), None)
    return tokens if isinstance(tokens, Tensor) and tokens.ndim > 1 else None


def _begin_again(positions: Tensor, real: Tensor | None, masked: bool) -> bool:
    """Return whether positions [B, T] belong to packed documents.

    Other positions may also fail to grow: constants, positions of padding, or those of a model with its own convention.
    In packed documents, positions grow by 1, and every document starts with the same, lowest position.
    """
    if masked and len(positions) > 1:
        return False
    real = torch.ones_like(positions, dtype=torch.bool) if real is None else real
    # Compare only neighbours that aren't padding.
    step, between = positions.diff(dim=1), real[:, 1:] & real[:, :-1]
    least = positions.masked_fill(~real, positions.max()).min()
    follows = (step == 1) & between
    again = (step != 1) & between
    return bool(follows.any() & again.any() & (positions[:, 1:] == least)[again].all())


def unpacked(tokens: Tensor, documents: Tensor) -> Tensor:
    """Rearrange values of tokens [B, T] by document: [D, L], padded with 0."""
    where = documents.flatten()
    order = torch.argsort(where, stable=True)
    order = order[where[order] >= 0]
    lengths = torch.bincount(where[order])
    begins = (lengths.cumsum(0) - lengths)[where[order]]
    offsets = torch.arange(len(order), device=order.device) - begins
    padded = tokens.new_zeros(len(lengths), int(lengths.max()))
    return padded.index_put((where[order], offsets), tokens.flatten()[order])


def by_document(losses: Mapping[str, Tensor], documents: Tensor) -> dict[str, Tensor]:
    """Rearrange losses of tokens [B, T], or of next tokens [B, T - 1], by document [D, L]; leave a batch's [] as it is.

    Raises:
        ValueError: They are losses of rows, which hold several documents.
    """
    rows, length = documents.shape
    losses = {k: F.pad(v, (0, 1)) if v.shape == (rows, length - 1) else v for k, v in losses.items()}
    for name, values in losses.items():
        if values.ndim and values.shape != documents.shape:
            raise ValueError(
                f"The loss `{name}` has shape {list(values.shape)}, but rows of the batch hold several documents: give "
                f"one loss per token, {list(documents.shape)}, or use a collator that pads instead of packing."
            )
    return {name: unpacked(values, documents) if values.ndim else values for name, values in losses.items()}


def by_token(segments: Tensor, documents: Tensor) -> Tensor:
    """Return the segment of each token [B, T], from the documents' segments [D]; -1 for none."""
    return torch.where(documents >= 0, segments[documents.clamp(min=0)], -1)


def without_documents(batch: Mapping[str, Any], documents: Tensor, keep: Tensor) -> dict[str, Any]:
    """Return the batch with only some of its documents, in one row.

    Args:
        batch: As collated.
        documents: See `packed_documents`.
        keep: [D] (bool), the documents to keep.

    Raises:
        ValueError: It holds rows that can't be assigned to documents.
    """
    chosen = by_token(keep.long(), documents).flatten() == 1
    lengths = torch.bincount(documents.flatten()[chosen], minlength=len(keep))[keep]
    bounds = F.pad(lengths.cumsum(0), (1, 0))
    longest = int(lengths.max())

    def select(key: str, value: Any) -> Any:
        if key in ("cu_seq_lens_q", "cu_seq_lens_k"):
            return bounds.to(value)
        if key in ("max_length_q", "max_length_k"):
            return longest
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if value.shape[:2] == documents.shape:
            return value.flatten(0, 1)[chosen.to(value.device)][None]
        if value.shape[1:] == documents.shape:  # positions in time, height and width
            return value.flatten(1)[:, chosen.to(value.device)][:, None]
        if len(value) == len(keep):
            return value[keep.to(value.device)]
        raise unknown_rows(key, f"shape {list(value.shape)}", f"{len(keep)} packed documents")

    return {key: select(key, value) for key, value in batch.items()}


def unknown_rows(key: str, what: str, instances: str) -> ValueError:
    """Build the error for leaving out an instance where some rows can't be assigned to instances."""
    return ValueError(
        f"An instance whose loss isn't finite can't be taken out of its batch: `{key}` has {what} for {instances}, so "
        "its rows are unknown. Leave that example out of the data, or have the collator return one row, or one list "
        "entry, per instance."
    )


def _first(real: Tensor) -> Tensor:
    """Mark each row's first token that isn't padding."""
    return real & (real.cumsum(1) == 1)

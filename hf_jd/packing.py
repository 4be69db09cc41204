"""Packed sequences: whose is each token of a row that holds several documents?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_documents(batch: Mapping[str, Any]) -> Tensor | None:
    """The document of each token, counted over all rows, where a row holds more than one.

    Documents are told by `cu_seq_lens_q` or `seq_idx`, or begin where `position_ids` don't go on by 1, as attention in
    transformers has it. Where there is an `attention_mask`, a document begins where positions don't grow, and padding
    belongs to none.

    Args:
        batch: As collated.

    Returns:
        [B, T], -1 for padding; None where no row is packed.
    """
    tokens = next((batch[key] for key in ("input_ids", "inputs_embeds") if batch.get(key) is not None), None)
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        return None
    shape, device = tokens.shape[:2], tokens.device
    mask = batch.get("attention_mask")
    real = mask.bool() if isinstance(mask, Tensor) and mask.shape == shape else None
    bounds, index, positions = (batch.get(key) for key in ("cu_seq_lens_q", "seq_idx", "position_ids"))
    if bounds is not None and shape[0] == 1:
        lengths = torch.as_tensor(bounds, device=device).flatten().diff()
        found = torch.arange(len(lengths), device=device).repeat_interleave(lengths)[None]
        return found if len(lengths) > 1 and found.shape == shape else None
    if index is not None and index.shape == shape:
        begins = index.diff(prepend=index[:, :1] - 1) != 0
    elif positions is not None and positions.shape == shape:
        step = positions.diff(prepend=positions[:, :1] - 1)
        begins = step != 1 if real is None else (step < 1) | _first(real)
    else:
        return None
    begins[:, 0] = True
    if real is not None:
        begins = begins & real
    if int(begins.sum(1).max()) < 2:
        return None
    found = begins.flatten().cumsum(0).view(shape) - 1
    return found if real is None else found.masked_fill(~real, -1)


def unpacked(tokens: Tensor, documents: Tensor) -> Tensor:
    """What is known of each token [B, T], by document: [D, L], 0 behind its end."""
    where = documents.flatten()
    order = torch.argsort(where, stable=True)
    order = order[where[order] >= 0]
    lengths = torch.bincount(where[order])
    begins = (lengths.cumsum(0) - lengths)[where[order]]
    offsets = torch.arange(len(order), device=order.device) - begins
    padded = tokens.new_zeros(len(lengths), int(lengths.max()))
    return padded.index_put((where[order], offsets), tokens.flatten()[order])


def by_document(losses: Mapping[str, Tensor], documents: Tensor) -> dict[str, Tensor]:
    """Losses of tokens [B, T], or of next tokens [B, T - 1], as those of documents [D, L]; a batch's [] as it is.

    Raises:
        ValueError: They are losses of rows, which hold several documents.
    """
    rows, length = documents.shape
    losses = {k: F.pad(v, (0, 1)) if v.shape == (rows, length - 1) else v for k, v in losses.items()}
    for name, values in losses.items():
        if values.ndim and values.shape != documents.shape:
            raise ValueError(
                f"The loss `{name}` has shape {list(values.shape)}, and the batch has rows of several documents: give "
                f"one loss for each token, {list(documents.shape)}, or use a collator that pads instead of packing."
            )
    return {name: unpacked(values, documents) if values.ndim else values for name, values in losses.items()}


def by_token(segments: Tensor, documents: Tensor) -> Tensor:
    """The segment of each token [B, T], from those of the documents [D]; -1 for none."""
    return torch.where(documents >= 0, segments[documents.clamp(min=0)], -1)


def without_documents(batch: Mapping[str, Any], documents: Tensor, keep: Tensor) -> dict[str, Any]:
    """The batch with some of its documents only, in one row; `keep` [D] (bool).

    Args:
        batch: As collated.
        documents: See `packed_documents`.
        keep: [D] (bool).
    """
    kept = by_token(keep.long(), documents).flatten() == 1
    lengths = torch.bincount(documents.flatten()[kept], minlength=len(keep))[keep]
    bounds = F.pad(lengths.cumsum(0), (1, 0))
    longest = int(lengths.max())

    def of(key: str, value: Any) -> Any:
        if key in ("cu_seq_lens_q", "cu_seq_lens_k"):
            return bounds.to(value)
        if key in ("max_length_q", "max_length_k"):
            return longest
        if not isinstance(value, Tensor):
            return value
        if value.shape[:2] == documents.shape:
            return value.flatten(0, 1)[kept.to(value.device)][None]
        by_document = value.ndim == 1 and len(value) == len(keep)
        return value[keep.to(value.device)] if by_document else value

    return {key: of(key, value) for key, value in batch.items()}


def _first(real: Tensor) -> Tensor:
    """Where a row's first token that isn't padding is."""
    return real & (real.cumsum(1) == 1)

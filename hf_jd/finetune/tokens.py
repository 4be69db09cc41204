"""Examples -> token ids and labels."""

from __future__ import annotations

import logging

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_jd.finetune.arguments import DataArguments
from hf_jd.finetune.data import text_columns

IGNORED = -100
"""The label of a token that isn't predicted, as everywhere in transformers."""

logger = logging.getLogger(__name__)


def tokenize(examples: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataArguments) -> Dataset:
    """Makes `input_ids` and `labels`, and keeps the task column.

    Raises:
        ValueError: No example has a token to be predicted.
    """
    columns = text_columns(examples)

    def encode(example: dict[str, str]) -> dict[str, list[int]]:
        prompt, completion = (example[name] for name in columns) if len(columns) == 2 else ("", example["text"])
        return encode_example(prompt, completion, tokenizer, data.max_length, data.add_eos)

    others = [name for name in examples.column_names if name != data.task_column]
    encoded = examples.map(encode, remove_columns=others, keep_in_memory=True, desc="Tokenizing")
    # The first token's label is never predicted.
    kept = [i for i, labels in enumerate(encoded["labels"]) if any(label != IGNORED for label in labels[1:])]
    if not kept:
        raise ValueError("No example has a token to be predicted: all completions (or texts) are empty.")
    if len(kept) < len(encoded):
        logger.warning("%d of %d examples are left out: their text is empty.", len(encoded) - len(kept), len(encoded))
        encoded = encoded.select(kept, keep_in_memory=True)
    return encoded


def encode_example(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, max_length: int, add_eos: bool
) -> dict[str, list[int]]:
    """Encodes one example; the loss is on the completion's tokens only.

    Prompt and completion are tokenized together, as a model meets them later, and a token that spans both is the
    completion's.

    Args:
        prompt: May be empty.
        completion: What follows it, without anything between.
        tokenizer: It adds what its model wants at the beginning.
        max_length: A longer example loses the beginning of its prompt, then the end of its completion.
        add_eos: Whether the end-of-sequence token is to be predicted, too.
    """
    ids = list(tokenizer(prompt + completion).input_ids)
    eos = tokenizer.eos_token_id
    if ids and ids[-1] == eos:
        ids.pop()  # Some tokenizers add it themselves.
    known = 0
    for ours, alone in zip(ids, tokenizer(prompt).input_ids, strict=False):
        if ours != alone:
            break
        known += 1
    if add_eos and eos is not None:
        ids.append(eos)
    first = 1 if ids and ids[0] == tokenizer.bos_token_id else 0
    too_many = max(0, min(len(ids) - max_length, known - first))
    ids = [*ids[:first], *ids[first + too_many :]][:max_length]
    known -= too_many
    return {"input_ids": ids, "labels": [IGNORED] * known + ids[known:]}

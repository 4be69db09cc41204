"""Examples -> token ids and labels."""

from __future__ import annotations

import logging
from collections import Counter
from os.path import commonprefix
from typing import Any

import numpy as np
from datasets import Dataset
from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_jd.finetune.data import Rows
from hf_jd.finetune.flags import DataArguments
from hf_jd.finetune.formats import Example, to_examples
from hf_jd.finetune.sentences import explained

IGNORED = -100
"""The label of a token that isn't predicted, as in transformers."""

PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The chat template for a tokenizer without one, saved with it: lines of `User: ...` and `Assistant: ...`."""

logger = logging.getLogger(__name__)


def tokenize(rows: Rows, tokenizer: PreTrainedTokenizerBase, data: DataArguments, source: str = "The data") -> Dataset:
    """Make `input_ids` and `labels`, and keep the task column; errors name the rows' source.

    Raises:
        ValueError: A row has no text or no task, or the chat template refuses it; or no row has a token to predict.
    """
    encoded: dict[str, list[Any]] = {name: [] for name in (data.task_column, "input_ids", "labels") if name}
    lengths: list[int] = []
    counts: Counter[str] = Counter()
    examples = to_examples(rows, data.task_column, source)
    for number, example in tqdm(examples, desc="Tokenizing", delay=2, leave=False, total=len(rows)):
        with explained(f"Row {number} doesn't fit the chat template", TemplateError):
            ids, labels = encode_example(example, tokenizer, data.add_eos, counts)
        lengths.append(len(ids))
        ids, labels = _truncate(ids, labels, tokenizer, data.max_length)
        if all(label == IGNORED for label in labels[1:]):  # the first token is never predicted
            continue
        # A list of Python integers takes nine times the memory.
        values = (example.task, np.asarray(ids, np.int32), np.asarray(labels, np.int32))
        for column, value in zip(encoded.values(), values[-len(encoded) :], strict=True):
            column.append(value)
    _report(counts, lengths, len(encoded["labels"]), data.max_length)
    if counts["pairs"] and tokenizer.chat_template and not counts["answers"]:
        logger.warning(
            "The tokenizer has a chat template, but these examples are plain texts, which are learned without it: give "
            "`messages` to train a chat model."
        )
    return Dataset.from_dict(encoded)


def _report(counts: Counter[str], lengths: list[int], learned: int, max_length: int) -> None:
    """Warn about text that isn't learned; raise a ValueError if nothing is."""
    if not learned:
        raise ValueError(
            "No example has a token to predict: all completions (or texts) are empty, or truncated. Check the data, or "
            "raise --max_length."
        )
    total = len(lengths)
    if learned < total:
        logger.warning(f"{total - learned} of {total} examples are left out: they have no text to learn.")
    if longer := sum(length > max_length for length in lengths):
        logger.warning(
            f"{longer} of {total} examples are longer than --max_length {max_length} (the longest has {max(lengths)} "
            "tokens): they lose the beginning of their prompt, then the end of their learned text."
        )
    if counts["rewritten"]:
        logger.warning(
            f"{counts['rewritten']} of {counts['answers']} answers of the assistant are not learned: the chat template "
            "changes them when more messages follow."
        )


def encode_example(
    example: Example, tokenizer: PreTrainedTokenizerBase, add_eos: bool, counts: Counter[str]
) -> tuple[list[int], list[int]]:
    """Encode one example; only the tokens of the completion, or of the assistant, have labels.

    The whole text is tokenized at once, as the model will see it later. A token across the boundary of prompt and
    answer belongs to the answer.

    Args:
        example: Texts, or messages for the tokenizer's chat template.
        tokenizer: Adds the tokens that its model needs at the beginning of a text.
        add_eos: Whether to learn a text's end-of-sequence token, too. A chat template ends answers itself.
        counts: Counts texts with a prompt (`pairs`), and answers of the assistant: all `answers`, and the `rewritten`
            ones, which can't be learned.

    Returns:
        Ids and labels, of equal length.
    """
    chat = isinstance(example.completion, list)
    if isinstance(example.completion, str) and isinstance(example.prompt, str):
        whole = example.prompt + example.completion
        spans = [(example.prompt, whole)]
        counts["pairs"] += example.prompt != ""
    else:
        whole, spans = _render(example, tokenizer, counts)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=not chat).input_ids)

    ids, eos = encode(whole), tokenizer.eos_token_id
    if not chat and ids and ids[-1] == eos:
        ids.pop()  # some tokenizers add it themselves
    labels = [IGNORED] * len(ids)
    for before, until in spans:
        ends = (ids if text == whole else commonprefix([ids, encode(text)]) for text in (before, until))
        learned = slice(*map(len, ends))
        labels[learned] = ids[learned]
    if not chat and add_eos and eos is not None:
        ids.append(eos)
        labels.append(eos)
    return ids, labels


def _render(
    example: Example, tokenizer: PreTrainedTokenizerBase, counts: Counter[str]
) -> tuple[str, list[tuple[str, str]]]:
    """Render messages as text; return it with spans (the text before an answer, the text up to its end)."""
    messages: list[Any] = [*example.prompt, *example.completion]
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
        logger.warning("The tokenizer has no chat template: messages are written as `User: ...`, `Assistant: ...`.")

    def render(some: list[Any], prompt: bool = False) -> str:
        text = tokenizer.apply_chat_template(some, tools=example.tools, tokenize=False, add_generation_prompt=prompt)
        assert isinstance(text, str)
        return text

    whole, spans = render(messages), []
    for i in range(max(1, len(example.prompt)), len(messages)):  # an opening message answers nothing
        if messages[i]["role"] == "assistant":
            counts["answers"] += 1
            before, until = render(messages[:i], prompt=True), render(messages[: i + 1])
            if until.startswith(before) and whole.startswith(until):
                spans.append((before, until))
            else:  # Templates of reasoning models drop the thoughts of all but the last answer.
                counts["rewritten"] += 1
    return whole, spans


def _truncate(
    ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[int], list[int]]:
    """Cut the beginning of the prompt, but not the beginning-of-sequence token, then the end."""
    prompt = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
    first = 1 if ids and ids[0] == tokenizer.bos_token_id else 0
    cut = slice(first, first + max(0, min(len(ids) - max_length, prompt - first)))
    del ids[cut], labels[cut]
    return ids[:max_length], labels[:max_length]

from __future__ import annotations

import pytest
from datasets import Dataset

from hf_jd.finetune.arguments import DataArguments
from hf_jd.finetune.example import MODEL, example_path
from hf_jd.finetune.model import load_tokenizer
from hf_jd.finetune.tokens import IGNORED, encode_example, tokenize


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(example_path(MODEL)))


def decoded_labels(example, tokenizer):
    return tokenizer.decode([label for label in example["labels"] if label != IGNORED])


def test_only_the_completion_is_learnt(tokenizer):
    example = encode_example("not a test =", " value", tokenizer, 32, add_eos=False)
    assert tokenizer.decode(example["input_ids"], skip_special_tokens=True) == "not a test = value"
    assert [label for label in example["labels"] if label != IGNORED] == tokenizer.convert_tokens_to_ids(["▁value"])


def test_all_of_a_text_but_its_beginning_mark_is_learnt(tokenizer):
    example = encode_example("", "One day", tokenizer, 32, add_eos=True)
    assert example["input_ids"][0] == tokenizer.bos_token_id
    assert example["labels"] == [IGNORED, *example["input_ids"][1:]]
    assert example["input_ids"][-1] == tokenizer.eos_token_id


def test_a_token_that_spans_both_is_learnt(tokenizer):
    whole = tokenizer("One day").input_ids
    example = encode_example("One da", "y", tokenizer, 32, add_eos=False)
    assert example["input_ids"] == whole
    assert decoded_labels(example, tokenizer).endswith("day")


@pytest.mark.parametrize("max_length", range(2, 12))
def test_a_long_example_loses_its_prompt_first(tokenizer, max_length):
    prompt, completion = "Once upon a time, there was a little girl", " named Lily"
    example = encode_example(prompt, completion, tokenizer, max_length, add_eos=True)
    whole = encode_example(prompt, completion, tokenizer, 100, add_eos=True)
    learnt = [label for label in whole["labels"] if label != IGNORED]
    found = [label for label in example["labels"] if label != IGNORED]
    assert len(example["input_ids"]) == len(example["labels"]) == max_length
    assert example["input_ids"][0] == tokenizer.bos_token_id
    assert found == learnt[: max_length - 1]


def test_empty_examples_are_left_out(tokenizer, caplog):
    examples = Dataset.from_dict({"prompt": ["a", "a"], "completion": [" b", ""], "task": ["x", "y"], "more": [1, 2]})
    found = tokenize(examples, tokenizer, DataArguments(add_eos=False, task_column="task"))
    assert found.column_names == ["task", "input_ids", "labels"]
    assert found["task"][:] == ["x"]
    assert "1 of 2 examples are left out" in caplog.text

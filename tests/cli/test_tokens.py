from __future__ import annotations

from collections import Counter

import pytest

from hf_jd.finetune.example import MODEL, example_path
from hf_jd.finetune.flags import DataArguments, ModelArguments
from hf_jd.finetune.formats import Example, to_examples
from hf_jd.finetune.model import load_tokenizer
from hf_jd.finetune.tokens import IGNORED, PLAIN_TEMPLATE, encode_example, tokenize

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like templates of reasoning models: only the last answer keeps its thoughts.
FORGETFUL = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' and loop.last %}(so:){% endif %}"
    "{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who is sad?"},
    {"role": "assistant", "content": "Lily was sad."},
    {"role": "user", "content": "Who is happy?"},
    {"role": "assistant", "content": "Tom was happy."},
]


@pytest.fixture
def tokenizer():
    return load_tokenizer(str(example_path(MODEL)), ModelArguments())


def encoded(prompt, completion, tokenizer, add_eos):
    ids, labels = encode_example(Example(prompt, completion), tokenizer, add_eos, Counter())
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, id_) for id_, label in zip(ids, labels, strict=True))
    return ids, labels


def decoded(labels, tokenizer):
    return tokenizer.decode([label for label in labels if label != IGNORED])


def tokens(rows, tokenizer, **flags):
    found = tokenize(rows, tokenizer, DataArguments(**flags))
    return [(row["input_ids"], row["labels"]) for row in found]


def example(row):
    ((_, converted),) = to_examples([row], None)
    return converted


def test_only_the_completion_is_learned(tokenizer):
    ids, labels = encoded("not a test =", " value", tokenizer, add_eos=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "not a test = value"
    assert [label for label in labels if label != IGNORED] == tokenizer.convert_tokens_to_ids(["▁value"])


def test_all_of_a_text_but_its_beginning_mark_is_learned(tokenizer):
    ids, labels = encoded("", "One day", tokenizer, add_eos=True)
    assert ids[0] == tokenizer.bos_token_id
    assert labels == [IGNORED, *ids[1:]]
    assert ids[-1] == tokenizer.eos_token_id


def test_a_token_that_spans_both_is_learned(tokenizer):
    ids, labels = encoded("One da", "y", tokenizer, add_eos=False)
    assert ids == tokenizer("One day").input_ids
    assert decoded(labels, tokenizer).endswith("day")


@pytest.mark.parametrize("max_length", range(2, 12))
def test_a_long_example_loses_its_prompt_first(tokenizer, max_length, caplog):
    row = {"prompt": "Once upon a time, there was a little girl", "completion": " named Lily"}
    ((ids, labels),) = tokens([row], tokenizer, max_length=max_length)
    ((whole, all_labels),) = tokens([row], tokenizer)
    learned = [label for label in all_labels if label != IGNORED]
    assert len(ids) == len(labels) == max_length
    assert ids[0] == tokenizer.bos_token_id
    assert [label for label in labels if label != IGNORED] == learned[: max_length - 1]
    assert (
        f"1 of 1 examples are longer than --max_length {max_length} (the longest has {len(whole)} tokens)"
        in caplog.text
    )


def test_empty_examples_are_left_out(tokenizer, caplog):
    rows = [
        {"prompt": "a", "completion": " b", "task": "x", "more": 1},
        {"prompt": "a", "completion": "", "task": "y", "more": 2},
    ]
    found = tokenize(rows, tokenizer, DataArguments(add_eos=False, task_column="task"))
    assert found.column_names == ["task", "input_ids", "labels"]
    assert found["task"][:] == ["x"]
    assert "1 of 2 examples are left out" in caplog.text


# ---- Chat ----


def test_only_what_the_assistant_says_is_learned(tokenizer):
    tokenizer.chat_template = CHATML
    ((ids, labels),) = tokens([{"messages": TALK}], tokenizer)
    assert ids == tokenizer(tokenizer.apply_chat_template(TALK, tokenize=False), add_special_tokens=False).input_ids
    assert decoded(labels, tokenizer) == "Lily was sad.<|im_end|>\nTom was happy.<|im_end|>\n"


def test_of_a_conversational_pair_the_completion_is_learned(tokenizer):
    tokenizer.chat_template = CHATML
    ((ids, labels),) = tokens([{"prompt": TALK[:4], "completion": TALK[4:]}], tokenizer)
    assert ids == tokens([{"messages": TALK}], tokenizer)[0][0]
    assert decoded(labels, tokenizer) == "Tom was happy.<|im_end|>\n"


def test_without_a_template_a_plain_one_is_used_and_saved(tokenizer, caplog, tmp_path):
    row = {"instruction": "Add.", "input": "1 + 2", "output": "3"}
    ((ids, labels),) = tokens([row], tokenizer)
    assert "".join(tokenizer.decode(ids).split()) == "<s>User:Add.1+2Assistant:3</s>"
    assert "".join(decoded(labels, tokenizer).split()) == "3</s>"
    assert "no chat template" in caplog.text
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), ModelArguments()).chat_template == PLAIN_TEMPLATE


def test_answers_that_a_template_rewrites_are_counted_and_not_learned(tokenizer, caplog):
    tokenizer.chat_template = FORGETFUL
    ((_, labels),) = tokens([{"messages": TALK}], tokenizer)
    assert decoded(labels, tokenizer) == "(so:)Tom was happy.;"
    assert "1 of 2 answers of the assistant are not learned" in caplog.text


def test_what_a_template_refuses_is_said_with_its_row(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(ValueError, match="Row 1 doesn't fit the chat template: Roles must alternate"):
        tokens([{"messages": TALK}], tokenizer)


def test_tools_reach_the_template(tokenizer):
    tokenizer.chat_template = "{% for t in tools %}{{ t['name'] }};{% endfor %}" + CHATML
    row = {"messages": TALK, "tools": [{"name": "clock", "unit": None}]}
    assert "clock;" in tokenizer.decode(tokens([row], tokenizer)[0][0])
    assert example(row).tools == [{"name": "clock"}]
    assert example(row | {"tools": '[{"name": "clock"}]'}).tools == [{"name": "clock"}]


def test_plain_texts_for_a_model_that_chats_are_remarked_on(tokenizer, caplog):
    tokenizer.chat_template = CHATML
    tokens([{"prompt": "a", "completion": "b"}], tokenizer)
    assert "give `messages` to train a chat model" in caplog.text


def test_names_of_other_tools_are_understood():
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    completion = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert example(row) == Example([], completion)
    parts = {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "b"}], "name": None}]}
    assert example(parts) == Example([], [{"role": "assistant", "content": "b"}])

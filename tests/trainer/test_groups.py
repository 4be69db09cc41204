"""Group columns: from every kind of dataset, through every collator, to the same ids."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from hf_jd.collator import GROUP_KEY, GroupCollator
from hf_jd.groups import group_names
from tests.models import VOCABULARY
from tests.trainer.runs import arguments, collate, examples, flat, logged, lora, relative, run

TASK = {"jd_objectives": "group", "jd_group_column": "task"}


@pytest.fixture(scope="module")
def tokenizer():
    words = {"[PAD]": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), pad_token="[PAD]"
    )


def without_labels(data):
    return [{k: v for k, v in example.items() if k != "labels"} for example in data]


DATASETS = {
    "list": lambda data: data,
    "Dataset": Dataset.from_list,
    "IterableDataset": lambda data: IterableDataset.from_generator(lambda: iter(data)),
}


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("collator", ["seq2seq", "lm", "default", "own"])
def test_group_names_pass_every_collator(kind, collator, tokenizer, tmp_path):
    data = examples()
    if collator == "lm":
        data = without_labels(data)
    if collator == "default":
        data = [{k: v if k == "task" else v[:4] for k, v in example.items()} for example in examples()]
    collators = {
        "seq2seq": DataCollatorForSeq2Seq(tokenizer),
        "lm": DataCollatorForLanguageModeling(tokenizer, mlm=False),
        "default": default_data_collator,
        "own": collate,
    }
    flags = {"jd_groups": ["chat", "code", "docs"]} if kind == "IterableDataset" else {}
    args = arguments(tmp_path, per_device_train_batch_size=3, max_steps=2, **flags, **TASK)
    trainer = run(lora("gpt2"), args, DATASETS[kind](data), data_collator=collators[collator])
    assert trainer.jd_group_names == ["chat", "code", "docs"]
    assert set(trainer.jd_state.names) <= {"chat", "code", "docs"}
    for name in trainer.jd_state.names:
        assert logged(trainer, f"jd/loss/{name}").isfinite().all()


def test_integers_may_be_group_names(tmp_path):
    data = [{**example, "task": 7 - i % 2} for i, example in enumerate(examples())]
    trainer = run(lora("gpt2"), arguments(tmp_path, **TASK), data)
    assert trainer.jd_group_names == ["6", "7"]
    stream = IterableDataset.from_generator(lambda: iter(data))
    trainer = run(lora("gpt2"), arguments(tmp_path, **TASK), stream)
    assert trainer.jd_state.names == ["6", "7"]


def test_workers_give_the_same_ids(tmp_path):
    models = [
        run(lora("gpt2"), arguments(tmp_path, max_steps=2, dataloader_num_workers=n, **TASK)).model for n in (0, 1)
    ]
    assert torch.equal(flat(models[0]), flat(models[1]))


def test_the_collator_replaces_the_column_with_ids():
    seen = []
    collator = GroupCollator(lambda batch: seen.extend(batch) or {}, "task", ["a", "b"])
    batch = collator([{"task": "b", "x": 1}, {"task": "a", "x": 2}, {"task": None, "x": 3}, {"task": "c", "x": 4}])
    assert batch[GROUP_KEY].tolist() == [1, 0, -1, -1]
    assert seen == [{"x": 1}, {"x": 2}, {"x": 3}, {"x": 4}]
    assert collator([{"x": 1}]) == {}


def test_groups_absent_from_an_update_have_no_objective(tmp_path):
    data = sorted(examples(12), key=lambda example: example["task"])
    args = arguments(tmp_path, max_steps=6, train_sampling_strategy="sequential", **TASK)
    trainer = run(lora("gpt2"), args, data)
    for entry in trainer.state.log_history[:-1]:
        assert sum(key.startswith("jd/weight/") for key in entry) == 1
    assert trainer.jd_state.names == ["docs"]


def test_evaluation_works_with_and_without_the_column(tmp_path):
    with_groups, plain = examples(5, seed=1), [{k: v for k, v in e.items() if k != "task"} for e in examples(5, seed=1)]
    trainer = run(lora("gpt2"), arguments(tmp_path, **TASK))
    losses = [trainer.evaluate(data)["eval_loss"] for data in (with_groups, plain, Dataset.from_list(with_groups))]
    assert losses[0] == losses[1] == losses[2]
    assert torch.isfinite(torch.as_tensor(trainer.predict(with_groups).predictions)).all()
    # Examples without labels take Trainer's other path, where the model gets every remaining key.
    trainer.model.forward = strict(trainer.model.forward)
    trainer.predict([{k: e[k] for k in ("input_ids", "attention_mask", "task")} for e in with_groups[:1]])


def strict(forward):
    def checked(*args, **kwargs):
        assert GROUP_KEY not in kwargs
        return forward(*args, **kwargs)

    return checked


def test_a_column_with_instances_only_splits_the_logs(tmp_path):
    plain = run(lora("gpt2"), arguments(tmp_path))
    split = run(lora("gpt2"), arguments(tmp_path, jd_group_column="task"))
    assert relative(flat(split.model), flat(plain.model)) == 0
    assert not any("jd/weight/" in key for entry in plain.state.log_history for key in entry)
    assert any("jd/weight/code" in entry for entry in split.state.log_history)


class TestErrors:
    def test_a_missing_column_is_refused(self, tmp_path):
        for data in (examples(), Dataset.from_list(examples())):
            with pytest.raises(ValueError, match="no group column `topic`; its columns are .*`task`"):
                run(lora("gpt2"), arguments(tmp_path, jd_objectives="group", jd_group_column="topic"), data)

    @pytest.mark.parametrize("value", [None, "", float("nan")])
    def test_a_missing_value_is_refused(self, value):
        data = examples()
        data[7]["task"] = value
        with pytest.raises(ValueError, match="Row 7 .* no value in the group column `task`"):
            group_names(data, "task")

    def test_a_missing_value_in_a_stream_is_refused(self, tmp_path):
        data = examples()
        data[3]["task"] = None
        stream = IterableDataset.from_generator(lambda: iter(data))
        with pytest.raises(ValueError, match="no value in the group column `task`, or a name that is not among"):
            run(lora("gpt2"), arguments(tmp_path, jd_groups=["chat", "code", "docs"], **TASK), stream)

    def test_a_missing_column_in_a_stream_is_refused(self, tmp_path):
        stream = IterableDataset.from_generator(lambda: iter(examples()))
        with pytest.raises(ValueError, match="no group column `topic`"):
            run(lora("gpt2"), arguments(tmp_path, jd_objectives="group", jd_group_column="topic"), stream)

    def test_names_of_a_stream_must_be_listed(self, tmp_path):
        stream = IterableDataset.from_generator(lambda: iter(examples()))
        with pytest.raises(ValueError, match="list them with --jd_groups"):
            run(lora("gpt2"), arguments(tmp_path, **TASK), stream)

    def test_packed_examples_without_bounds_have_no_group(self, tmp_path):
        collator = DataCollatorWithFlattening(return_position_ids=False)
        with pytest.raises(ValueError, match="collator that pads, or one that packs and returns `position_ids`"):
            run(lora("gpt2"), arguments(tmp_path, **TASK), data_collator=collator)


@pytest.mark.parametrize("objectives", ["instance", "group"])
@pytest.mark.parametrize("backward", ["one_pass", "two_pass"])
def test_jd_ascend_raises_a_groups_loss(objectives, backward, tmp_path):
    flags = {"per_device_train_batch_size": 6, "max_steps": 1, "optim": "sgd", "jd_weighting": "mean"}
    flags |= {"jd_group_column": "task", "jd_objectives": objectives, "jd_backward": backward, "max_grad_norm": 0.0}
    start = flat(lora("gpt2", warm=True))

    def step(**more):
        trainer = run(lora("gpt2", warm=True), arguments(tmp_path, **flags, **more))
        return flat(trainer.model) - start, trainer

    down, stock = step()
    mixed, raised = step(jd_ascend=["code"])
    up, _ = step(jd_ascend=["code", "docs", "chat"])
    assert relative(up, -down) < 1e-6
    assert relative(mixed, down) > 1e-2
    for key in ("loss", "jd/loss/code"):
        assert logged(raised, key) == logged(stock, key) > 0
    sign = [(-1 if name == "code" else 1) for name in raised.jd_state.names] if objectives == "group" else None
    if sign is not None:
        torch.testing.assert_close(
            raised.jd_state.gramian, stock.jd_state.gramian * torch.tensor(sign).outer(torch.tensor(sign))
        )

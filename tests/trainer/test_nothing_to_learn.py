"""Batches with few labels or none: all labels are learned, and an update without any is no step."""

from __future__ import annotations

import pytest
import torch

from tests.trainer.runs import arguments, collate, examples, flat, logged, lora, relative, run, stock
from tests.trainer.tasks import TABLE, examples_of, model_of
from tests.trainer.tasks import collate as collate_any

GROUP = {"jd_objectives": "group", "jd_group_column": "task"}
KINDS = {
    "instance": {},
    "group": GROUP,
    "own-means": {**GROUP, "jd_group_reduction": "mean"},
    "two-pass": {"jd_backward": "two_pass"},
    "micro-batch": {"jd_scope": "micro_batch"},
}
IN_ORDER = {"train_sampling_strategy": "sequential"}
SPARSE = {"one instance": (3,), "a micro-batch": (2, 3), "all but one instance": (0, 1, 2, 3, 4)}


def without_some(*left_out):
    """Return a collator that leaves examples out, like a filter; if none remain, it returns tensors [0, T]."""

    def filtering(batch):
        keep = [example["input_ids"] not in left_out for example in batch]
        return {key: value[torch.tensor(keep)] for key, value in collate(batch).items()}

    return filtering


@pytest.mark.parametrize("sparse", SPARSE)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "own-means"])
def test_mean_equals_trainer_if_labels_are_missing(kind, sparse, tmp_path):
    data = examples(6, unlabelled=SPARSE[sparse])
    flags = {"gradient_accumulation_steps": 3, "max_steps": 2, **IN_ORDER}
    theirs = stock(lora("gpt2"), tmp_path, data, **flags)
    ours = run(lora("gpt2"), arguments(tmp_path, jd_weighting="mean", **flags, **KINDS[kind]), data)
    assert relative(flat(ours.model), flat(theirs.model)) < (1e-6 if kind == "two-pass" else 1e-10)
    assert relative(logged(ours, "loss"), logged(theirs, "loss")) < 1e-6
    assert flat(ours.model).isfinite().all()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_without_labels_is_no_step(kind, accumulation, tmp_path):
    # Trainer divides by the number of tokens, which is 0, so its parameters become NaN.
    data = examples(4, unlabelled=(0, 1, 2, 3))
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, weight_decay=0.1, max_steps=2, **KINDS[kind])
    ours = run(lora("gpt2"), args, data)
    assert torch.equal(flat(ours.model), flat(lora("gpt2")))
    assert logged(ours, "loss").tolist() == [0, 0]


@pytest.mark.parametrize("name", ["masked", "token", "single-label"])
def test_a_micro_batch_without_labels_in_other_tasks(name, tmp_path):
    # These heads' mean over no labels is NaN, so the reference leaves the batch out. Trainer adds up the heads' means.
    task = TABLE[name]
    data, models = examples_of(task, 6), []
    for example in data[2:4]:
        labels = example["labels"]
        example["labels"] = [-100] * len(labels) if isinstance(labels, list) else -100
    for chosen in (data, data[:2] + data[4:]):
        flags = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": len(chosen) // 2, "max_steps": 2}
        args = arguments(tmp_path, jd_weighting="upgrad", **flags, **IN_ORDER)
        models.append(flat(run(model_of(task, True), args, chosen, data_collator=collate_any).model))
    assert models[0].isfinite().all()
    assert relative(models[1], models[0]) < 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_micro_batch_adds_nothing(kind, tmp_path):
    data = examples(6)
    empty = without_some(*(example["input_ids"] for example in data[2:4]))
    flags = {"gradient_accumulation_steps": 3, "max_steps": 2, "jd_weighting": "mean", **IN_ORDER, **KINDS[kind]}
    some = run(lora("gpt2"), arguments(tmp_path, **flags), data, data_collator=empty)
    for example in data[2:4]:
        example["labels"] = [-100] * len(example["labels"])
    unlabelled = run(lora("gpt2"), arguments(tmp_path, **flags), data)
    assert relative(flat(some.model), flat(unlabelled.model)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_update_is_no_step(kind, tmp_path):
    data = examples(4)
    empty = without_some(*(example["input_ids"] for example in data))
    ours = run(lora("gpt2"), arguments(tmp_path, max_steps=2, **KINDS[kind]), data, data_collator=empty)
    assert torch.equal(flat(ours.model), flat(lora("gpt2")))

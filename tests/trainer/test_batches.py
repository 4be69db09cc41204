"""Batches in all forms that collators make: each is trained like in the stock Trainer, or refused in one sentence."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BatchFeature, Trainer, TrainingArguments, default_data_collator
from transformers.tokenization_utils_base import BatchEncoding

from hf_jd import JDTrainer
from hf_jd.batches import holds_examples, row_count, selected, stand_in, without_groups
from tests.models import tiny_gpt2
from tests.trainer.runs import arguments, flat, logged, relative, run

KEEP = torch.tensor([True, False, True])
FIRST = {
    "flag": {"return_loss": True},
    "int": {"step": 3},
    "none": {"token_type_ids": None},
    "strings": {"ids": ["a", "b", "c", "d"]},
    "nested": {"more": {"sizes": torch.ones(4, 2), "flag": False}},
    "zero-dim": {"temperature": torch.tensor(1.0)},
    "list": {"boxes": [torch.ones(i + 1, 4) for i in range(4)]},
    "array": {"raw": np.ones((4, 2))},
    "tuple": {"pair": (torch.ones(4), torch.ones(4))},
}
DATA = [{"x": [float(i % 5), 1.0, float(i % 3)], "labels": float(i % 2)} for i in range(16)]


class Scorer(nn.Module):
    """A model that accepts any inputs, and returns one loss per instance."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1).double()

    def forward(self, x=None, labels=None, **others):
        return (self.layer(x.double()).squeeze(1) - labels).square()


class Ours(JDTrainer):
    def compute_losses(self, model, inputs):
        return model(**inputs)


class Theirs(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).mean()


def collate(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in ("x", "labels")}


def both(tmp_path, collator, data=DATA, ours=Ours, theirs=Theirs, model=Scorer):
    """Train on the same data with both trainers, with `mean`."""
    flags = {"remove_unused_columns": False, "per_device_train_batch_size": 4, "optim": "sgd", "max_steps": 3}
    stock = run(model(), arguments(tmp_path, TrainingArguments, **flags), data, theirs, data_collator=collator)
    args = arguments(tmp_path, jd_weighting="mean", **flags)
    return run(model(), args, data, ours, data_collator=collator), stock


def assert_stock(ours, theirs):
    start = flat(type(theirs.model)())
    assert relative(flat(theirs.model), start) > 1e-3
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10
    assert relative(logged(ours, "loss"), logged(theirs, "loss")) < 1e-6


@pytest.mark.parametrize("first", FIRST)
def test_mean_equals_trainer_whatever_comes_first(first, tmp_path):
    assert_stock(*both(tmp_path, lambda rows: {**FIRST[first], **collate(rows)}))


class Frozen(Mapping):
    """A mapping that can't be changed."""

    def __init__(self, values):
        self.values_by_name = dict(values)

    def __getitem__(self, key):
        return self.values_by_name[key]

    def __iter__(self):
        return iter(self.values_by_name)

    def __len__(self):
        return len(self.values_by_name)


@pytest.mark.parametrize("kind", [BatchEncoding, BatchFeature, UserDict, Frozen])
def test_mean_equals_trainer_for_any_mapping(kind, tmp_path):
    seen = set()

    class Popping(Ours):
        def compute_losses(self, model, inputs):
            seen.add(type(inputs))
            return super().compute_losses(model, inputs)

    assert_stock(*both(tmp_path, lambda rows: kind(collate(rows)), ours=Popping))
    assert seen == {kind}


def test_popped_labels_return_in_a_second_pass(tmp_path):
    class Popping(JDTrainer):
        def compute_losses(self, model, inputs):
            labels = inputs.pop("labels")
            return model(**inputs, labels=labels)

    args = arguments(tmp_path, jd_weighting="mean", jd_backward="two_pass", remove_unused_columns=False)
    args_once = arguments(tmp_path, jd_weighting="mean", remove_unused_columns=False)
    models = [run(Scorer(), a, DATA, Popping, data_collator=collate).model for a in (args, args_once)]
    assert relative(flat(models[0]), flat(models[1])) < 1e-10


def nested(rows):
    batch = collate(rows)
    return {"features": {"x": batch["x"], "deeper": [{"labels": batch["labels"]}]}}


class Nested(Scorer):
    def forward(self, features=None):
        return super().forward(features["x"], features["deeper"][0]["labels"])


class Listed(Scorer):
    def forward(self, x, labels):
        return super().forward(x, labels)


def test_mean_equals_trainer_with_nested_tensors(tmp_path):
    assert_stock(*both(tmp_path, nested, model=Nested))


def test_mean_equals_trainer_for_list_batches(tmp_path):
    class OursListed(JDTrainer):
        def compute_losses(self, model, inputs):
            return model(*inputs)

    class TheirsListed(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(*inputs).mean()

    assert_stock(
        *both(tmp_path, lambda rows: [*collate(rows).values()], ours=OursListed, theirs=TheirsListed, model=Listed)
    )


@dataclass
class Example:
    x: list[float]
    labels: float


def test_mean_equals_trainer_for_example_objects(tmp_path):
    assert_stock(*both(tmp_path, default_data_collator, [Example(**row) for row in DATA]))


def test_an_empty_batch_raises_trainers_error(tmp_path):
    with pytest.raises(ValueError, match="The batch received was empty"):
        run(Scorer(), arguments(tmp_path), DATA, Ours, data_collator=lambda rows: {})


def test_a_list_without_labels_is_refused(tmp_path):
    args = arguments(tmp_path, remove_unused_columns=False)
    with pytest.raises(ValueError, match="The batch is a list, without names"):
        run(tiny_gpt2(), args, DATA, JDTrainer, data_collator=lambda rows: [*collate(rows).values()])


def test_losses_of_no_instance_are_refused(tmp_path):
    class None_(JDTrainer):
        def compute_losses(self, model, inputs):
            return model(**inputs)[:0]

    with pytest.raises(ValueError, match="losses of no instance for a batch that isn't empty"):
        run(Scorer(), arguments(tmp_path, remove_unused_columns=False), DATA, None_, data_collator=collate)


def test_batch_losses_need_no_number_of_instances(tmp_path):
    class Means(JDTrainer):
        def compute_losses(self, model, inputs):
            losses = model(inputs["features"])
            return {"a": losses.mean(), "b": losses.sqrt().mean()}

    class Sum(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            losses = model(inputs["features"])
            return losses.mean() + losses.sqrt().mean()

    flags = {"remove_unused_columns": False, "optim": "sgd", "max_steps": 2, "max_grad_norm": 0.0}
    args = arguments(tmp_path, jd_weighting="mean", jd_objectives="loss", **flags)
    ours = run(Nested(), args, DATA, Means, data_collator=nested)
    theirs = run(Nested(), arguments(tmp_path, TrainingArguments, **flags), DATA, Sum, data_collator=nested)
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10


EMPTY = torch.zeros(0, 5)


@pytest.mark.parametrize(
    ("batch", "holds"),
    [
        ({"a": EMPTY}, False),
        ({"flag": True, "scale": torch.tensor(2.0), "a": {"b": [EMPTY, np.zeros((0, 2))]}}, False),
        ({"jd_group": torch.ones(3), "a": EMPTY}, False),
        ([EMPTY, EMPTY], False),
        ({"a": {"b": torch.ones(1)}}, True),
        ({"a": ["some", "text"]}, True),
        ({"a": object()}, True),
        ({}, True),
        ({"scale": torch.tensor(2.0)}, True),
    ],
)
def test_a_batch_is_empty_if_all_its_tensors_are(batch, holds):
    assert holds_examples(batch) is holds


def test_a_batch_of_one_example_replaces_an_empty_batch():
    made = stand_in({"jd_group": EMPTY, "a": {"mask": EMPTY, "b": [EMPTY, 3]}, "flag": None})
    assert list(made) == ["a", "flag"]
    assert made["a"]["mask"].tolist() == [[1] * 5]
    assert made["a"]["b"][0].tolist() == [[0] * 5]
    assert made["a"]["b"][1] == 3


def test_the_number_of_instances_is_estimated():
    assert (
        row_count({"flag": True, "pixel_values": torch.ones(7, 3), "a": torch.ones(4, 2), "b": {"c": np.ones(4)}}) == 4
    )
    assert row_count({"jd_group": torch.ones(2), "a": torch.ones(4, 2)}) == 2
    assert row_count({"text": ["a"]}) is None


def test_removing_group_ids_restores_the_batch():
    batch = BatchEncoding({"a": torch.ones(2), "jd_group": torch.ones(2)})
    assert list(without_groups(batch)) == ["a"]
    assert type(without_groups(batch)) is BatchEncoding
    assert "jd_group" in batch


def test_instances_are_taken_out_at_any_depth():
    batch = {
        "x": torch.arange(3),
        "nested": {"boxes": [torch.ones(1, 4), torch.ones(2, 4), torch.ones(3, 4)], "names": ("a", "b", "c")},
        "labels": [{"boxes": torch.ones(i)} for i in range(3)],
        "array": np.arange(6).reshape(3, 2),
        "position_ids": torch.arange(3)[:, None, None].expand(3, 3, 2),
        "shared": torch.ones(1, 5),
        "size": [224, 224],
        "flag": True,
        "none": None,
    }
    made = selected(batch, KEEP)
    assert made["x"].tolist() == [0, 2]
    assert [len(boxes) for boxes in made["nested"]["boxes"]] == [1, 3]
    assert made["nested"]["names"] == ("a", "c")
    assert [len(label["boxes"]) for label in made["labels"]] == [0, 2]
    assert made["array"].tolist() == [[0, 1], [4, 5]]
    assert made["position_ids"].shape == (3, 2, 2)
    assert made["position_ids"][:, 0, 0].tolist() == [0, 1, 2]
    assert made["shared"].shape == (1, 5)
    assert made["size"] == [224, 224]
    assert made["flag"] is True
    assert type(selected(BatchFeature({"x": torch.arange(3)}), KEEP)) is BatchFeature


@pytest.mark.parametrize(
    "batch",
    [
        {"pixel_values": torch.ones(7, 4)},
        {"deep": [{"images": torch.ones(2, 4)}]},
        {"raw": np.ones((5, 2))},
        {"either": [torch.ones(3, 2)] * 3},
    ],
)
def test_rows_of_unknown_instances_are_refused(batch):
    with pytest.raises(ValueError, match="can't be taken out of its batch"):
        selected(batch, KEEP)


class Pictured(Scorer):
    """A model of concatenated pictures; `pictures` says how many each example has."""

    def forward(self, pixel_values=None, pictures=None, labels=None):
        owner = torch.arange(len(pictures)).repeat_interleave(pictures)
        each = self.layer(pixel_values.double()).squeeze(1)
        return (each.new_zeros(len(pictures)).index_add(0, owner, each) - labels).square()


@pytest.mark.parametrize("kind", ["nested", "list", "flattened"])
def test_a_nonfinite_instance_is_left_out_or_the_batch_refused(kind, tmp_path):
    data = [dict(row) for row in DATA[:4]]
    data[1]["x"] = [float("nan")] * 3

    def flattened(rows):
        batch, pictures = collate(rows), torch.tensor([2, 1, 1, 2])
        return {
            "pixel_values": batch["x"].repeat_interleave(pictures, 0),
            "pictures": pictures,
            "labels": batch["labels"],
        }

    def listed(rows):
        batch = collate(rows)
        return {"x": list(batch["x"]), "labels": batch["labels"]}

    class OfList(Scorer):
        def forward(self, x=None, labels=None):
            return super().forward(torch.stack(x), labels)

    model, collator = {"nested": (Nested, nested), "list": (OfList, listed), "flattened": (Pictured, flattened)}[kind]
    flags = {"remove_unused_columns": False, "max_steps": 1, "optim": "sgd", "per_device_train_batch_size": 4}
    args = arguments(tmp_path, train_sampling_strategy="sequential", jd_weighting="mean", **flags)
    if kind == "flattened":
        with pytest.raises(ValueError, match=r"`pixel_values` has shape \[6, 3\] for 4 instances"):
            run(model(), args, data, Ours, data_collator=collator)
        return
    ours = run(model(), args, data, Ours, data_collator=collator)
    without = arguments(tmp_path, TrainingArguments, train_sampling_strategy="sequential", **flags)
    theirs = run(Scorer(), without, [data[0], *data[2:]], Theirs, data_collator=collate)
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10

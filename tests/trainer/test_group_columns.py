"""Group columns: any type, any kind of example, read without side effects; and packed rows, recognised reliably."""

from __future__ import annotations

import random
from collections import UserDict
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from torch.utils.data import ConcatDataset, Subset
from transformers import TrainingArguments, default_data_collator

from hf_jd.collator import GROUP_KEY, GroupCollator
from hf_jd.groups import group_names, groups_of_each
from hf_jd.packing import packed_documents
from tests.trainer.runs import arguments, flat, logged, relative, run
from tests.trainer.tasks import TABLE, examples_of, model_of
from tests.trainer.tasks import collate as collate_any


@pytest.mark.parametrize("column", ["labels", "label"])
@pytest.mark.parametrize("kind", [list, Dataset.from_list], ids=["list", "Dataset"])
def test_the_labels_may_be_the_group_column(kind, column, tmp_path):
    def collate(rows):
        return collate_any(
            [{("labels" if key == "label" else key): value for key, value in row.items()} for row in rows]
        )

    task = TABLE["single-label"]
    data = [
        {(column if key == "labels" else key): v for key, v in e.items() if key != "task"}
        for e in examples_of(task, 12)
    ]
    flags = {"per_device_train_batch_size": 6}
    group = {"jd_objectives": "group", "jd_group_column": column, "jd_weighting": "mean"}
    theirs = run(
        model_of(task, True), arguments(tmp_path, TrainingArguments, **flags), kind(data), data_collator=collate
    )
    ours = run(model_of(task, True), arguments(tmp_path, **flags, **group), kind(data), data_collator=collate)
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10
    assert ours.jd_group_names == ["0", "1", "2"]
    assert set(ours.jd_state.names) <= {"0", "1", "2"}
    assert relative(logged(ours, "loss"), logged(theirs, "loss")) < 1e-6


def test_a_collator_may_build_the_labels_from_the_column():
    def collate(rows):
        assert all("kind" not in row for row in rows)
        return {"labels": torch.tensor([ord(row["kind"]) for row in rows])}

    batch = GroupCollator(collate, "kind", ["a", "b"])([{"kind": "b"}, {"kind": "a"}])
    assert batch["labels"].tolist() == [98, 97]
    assert batch[GROUP_KEY].tolist() == [1, 0]
    with pytest.raises(KeyError, match="other"):
        GroupCollator(lambda rows: rows[0]["other"], "kind", ["a"])([{"kind": "a"}])


VALUES = {
    "np.str_": ([np.str_("a"), np.str_("b")], ["a", "b"]),
    "np.int64": ([np.int64(3), np.int64(2)], ["2", "3"]),
    "0-d tensor": ([torch.tensor(3), torch.tensor(2)], ["2", "3"]),
    "0-d array": ([np.array(3), np.array("b")], ["3", "b"]),
    "bool": ([True, np.bool_(False)], ["False", "True"]),
    "whole floats": ([2.0, np.float32(3), torch.tensor(2.0)], ["2", "3"]),
    "other floats": ([2.5, 3], ["2.5", "3"]),
    "documents": ([np.array(["a", "b"]), torch.tensor([1, 2]), ("a", "c")], ["1", "2", "a", "b", "c"]),
}


@pytest.mark.parametrize("kind", VALUES)
def test_group_values_may_have_any_type(kind):
    values, names = VALUES[kind]
    data = [{"task": value} for value in values]
    assert group_names(data, "task") == names
    ids = GroupCollator(lambda rows: {}, "task", names)(data)[GROUP_KEY].tolist()
    assert [names[i] for i in ids] == [name for of_one in groups_of_each(data, "task") for name in of_one]


NO_VALUES = [None, "", float("nan"), np.float32("nan"), torch.tensor(torch.nan), np.str_(""), pd.NA, pd.NaT, [pd.NA]]


@pytest.mark.parametrize("value", NO_VALUES)
def test_missing_values_of_any_type_are_refused(value):
    with pytest.raises(ValueError, match="Row 0 .* no value in the group column `task`"):
        group_names([{"task": value}], "task")


@pytest.mark.parametrize("value", [2, np.int64(2), torch.tensor(2), 2.0, np.float32(2), "2"])
def test_a_stream_may_hold_ids(value):
    assert GroupCollator(lambda rows: {}, "task", None)([{"task": value}])[GROUP_KEY].tolist() == [2]
    assert GroupCollator(lambda rows: {}, "task", None)([{"task": True}])[GROUP_KEY].tolist() == [1]


@pytest.mark.parametrize("value", [2.5, "code", -3, np.int64(-1), "-2"])
def test_a_stream_of_names_needs_a_list(value):
    with pytest.raises(ValueError, match="holds names, such as `.*list them with --jd_groups"):
        GroupCollator(lambda rows: {}, "task", None)([{"task": value}])


@dataclass(frozen=True)
class Frozen:
    task: str
    x: int


class Plain:
    def __init__(self, task, x):
        self.task, self.x = task, x


@pytest.mark.parametrize(
    "kind",
    [
        dict,
        lambda **row: UserDict(row),
        lambda **row: MappingProxyType(row),
        Frozen,
        Plain,
    ],
    ids=["dict", "UserDict", "mapping", "dataclass", "object"],
)
def test_examples_may_be_mappings_or_objects(kind):
    data = [kind(task=task, x=i) for i, task in enumerate("bab")]
    assert group_names(data, "task") == ["a", "b"]
    batch = GroupCollator(default_data_collator, "task", ["a", "b"])(data)
    assert batch.pop(GROUP_KEY).tolist() == [1, 0, 1]
    assert {key: value.tolist() for key, value in batch.items()} == {"x": [0, 1, 2]}
    assert group_names(data, "task") == ["a", "b"], "the examples are the dataset's own"


def test_a_list_batch_is_refused():
    with pytest.raises(ValueError, match="The collator returned a list, which can't hold the group ids"):
        GroupCollator(list, "task", ["a"])([{"task": "a"}])


def test_the_collators_tokenizer_is_still_found():
    class Padding:
        tokenizer = "mine"

        def __call__(self, rows):
            return {}

    assert GroupCollator(Padding(), "task", None).tokenizer == "mine"
    with pytest.raises(AttributeError):
        _ = GroupCollator(Padding(), "task", None).other


class Images(torch.utils.data.Dataset):
    """A dataset of random examples, which must not be built just to read their groups' names."""

    def __init__(self, strict=True):
        self.strict = strict

    def __len__(self):
        return 4

    def __getitem__(self, i):
        assert not self.strict, "an image was read"
        random.random(), np.random.rand(), torch.rand(1)
        return {"task": "abab"[i], "image": torch.rand(3)}


class OfAttribute(Images):
    task = ("a", "b", "a", "b")


class OfMethod(Images):
    def task(self):
        return np.array(["a", "b", "a", "b"])


def table(columns=("task", "x")):
    def transform(rows):
        raise AssertionError("an image was read")

    data = Dataset.from_list([{"task": task, "x": i} for i, task in enumerate("abab")]).select_columns(list(columns))
    return data.with_transform(transform)


@pytest.mark.parametrize(
    "build",
    [
        table,
        OfAttribute,
        OfMethod,
        lambda: Subset(table(), [3, 0, 1, 1]),
        lambda: ConcatDataset([table(), OfMethod()]),
        lambda: Subset(ConcatDataset([OfAttribute(), table()]), torch.arange(8)),
    ],
    ids=["transform", "attribute", "method", "Subset", "ConcatDataset", "nested"],
)
def test_a_readable_column_builds_no_examples(build):
    assert group_names(build(), "task") == ["a", "b"]
    if isinstance(build(), Subset) and len(build()) == 4:
        assert groups_of_each(build(), "task") == [["b"], ["a"], ["b"], ["b"]]


@pytest.mark.parametrize("build", [lambda: Images(strict=False), lambda: Subset(Images(strict=False), [0, 1])])
def test_reading_examples_draws_nothing(build):
    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    found = []
    for read in (False, True):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        if read:
            assert group_names(build(), "task") == ["a", "b"]
        found.append(drawn())
    assert found[0] == found[1]


def test_a_transform_may_add_the_column():
    data = Dataset.from_list([{"x": i} for i in range(4)])
    made = data.with_transform(lambda rows: {"task": ["ab"[x % 2] for x in rows["x"]]})
    assert group_names(made, "task") == ["a", "b"]
    with pytest.raises(ValueError, match="no group column `topic`; its columns are `task`"):
        group_names(made, "topic")
    with pytest.raises(ValueError, match="no group column `task`; its columns are `x`"):
        group_names(data, "task", ["a"])


MASK = torch.ones(2, 6, dtype=torch.long)
NOT_PACKED = {
    "constant": [[0] * 6, [0] * 6],
    "another constant": [[3] * 6],
    "offset": [[5, 6, 7, 8, 9, 10], [0, 1, 2, 3, 4, 5]],
    "padded on the left": [[1, 1, 1, 0, 1, 2]],
    "pairs": [[0, 0, 1, 1, 2, 2]],
    "backwards": [[5, 4, 3, 2, 1, 0]],
    "jumps": [[0, 1, 2, 7, 8, 9]],
    "begin again elsewhere": [[0, 1, 2, 1, 2, 3]],
}


@pytest.mark.parametrize("kind", NOT_PACKED)
@pytest.mark.parametrize("masked", [False, True])
def test_ambiguous_positions_mark_no_documents(kind, masked):
    positions = torch.tensor(NOT_PACKED[kind])
    batch = {"input_ids": torch.ones_like(positions), "position_ids": positions}
    if masked:
        batch["attention_mask"] = torch.ones_like(positions)
    assert packed_documents(batch) is None


def test_three_dimensional_positions_mark_no_documents():
    batch = {"input_ids": MASK, "position_ids": torch.zeros(3, 2, 6, dtype=torch.long)}
    assert packed_documents(batch) is None


def test_jd_packed_decides_about_ambiguous_rows():
    batch = {"input_ids": MASK, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 0, 1]])}
    documents = [[0, 0, 0, 1, 1, 1], [2, 2, 3, 3, 4, 4]]
    assert packed_documents(batch).tolist() == packed_documents(batch, "always").tolist() == documents
    assert packed_documents(batch, "never") is None
    batch["attention_mask"] = MASK
    assert packed_documents(batch) is None
    assert packed_documents(batch, "always").tolist() == documents
    one = {key: value[:1] for key, value in batch.items()}
    assert packed_documents(one).tolist() == documents[:1]


def test_tokens_after_the_last_bound_are_padding():
    batch = {"input_ids": MASK[:1], "cu_seq_lens_q": torch.tensor([0, 2, 4], dtype=torch.int32)}
    assert packed_documents(batch).tolist() == [[0, 0, 1, 1, -1, -1]]


def test_mean_equals_trainer_with_custom_positions(tmp_path):
    task = TABLE["masked"]
    for positions in (lambda n: [0] * n, lambda n: [i % 2 for i in range(n)]):
        data = [{**e, "position_ids": positions(len(e["input_ids"]))} for e in examples_of(task, 8)]
        data = [{key: value[:4] for key, value in e.items() if key not in ("task", "attention_mask")} for e in data]
        flags = {"per_device_train_batch_size": 4}
        theirs = run(
            model_of(task, True), arguments(tmp_path, TrainingArguments, **flags), data, data_collator=collate_any
        )
        args = arguments(tmp_path, jd_weighting="mean", jd_packed="never", **flags)
        ours = run(model_of(task, True), args, data, data_collator=collate_any)
        assert relative(flat(ours.model), flat(theirs.model)) < 1e-10
        assert len(ours.jd_state.gramian) == 4


def test_always_packed_needs_document_bounds(tmp_path):
    task = TABLE["masked"]
    data = [{key: value for key, value in e.items() if key != "task"} for e in examples_of(task, 8)]
    with pytest.raises(ValueError, match="--jd_packed is `always`, but nothing in the batch tells"):
        run(model_of(task, True), arguments(tmp_path, jd_packed="always"), data, data_collator=collate_any)

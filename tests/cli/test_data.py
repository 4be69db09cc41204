from __future__ import annotations

import csv
import gzip
import json

import pyarrow.parquet
import pytest
from datasets import Dataset

from hf_jd.finetune import example
from hf_jd.finetune.data import load_examples, read_files
from hf_jd.finetune.flags import DataArguments
from tests.cli.conftest import ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "lines.json", "rows.csv", "rows.parquet", "rows.jsonl.gz"])
def test_every_kind_of_file_holds_the_same(tmp_path, name):
    path = tmp_path / name
    if name == "rows.parquet":
        pyarrow.parquet.write_table(Dataset.from_list(ROWS).data.table, path)
    elif name == "rows.csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["task", "prompt", "completion"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif name == "rows.json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)))
    assert read_files([str(path)]) == ROWS


def test_several_files_folders_and_globs_are_one_set(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "notes.md").write_text("not data")
    both = [{"text": "a.jsonl"}, {"text": "b.jsonl"}]
    assert read_files([str(tmp_path)]) == both
    assert read_files([str(tmp_path / "*.jsonl")]) == both
    assert read_files([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]) == both[::-1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no file to read at .*empty: .* that end in .jsonl"):
        read_files([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="no file to read at .*csv"):
        read_files([str(tmp_path / "*.csv")])


def test_texts_that_look_like_dates_remain_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "2020-01-01"}\n{"text": "2020-01-02"}\n')
    assert read_files([str(tmp_path / "a.jsonl")])[0] == {"text": "2020-01-01"}


def test_a_folder_is_a_data_set_too(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    found = load_examples(DataArguments(dataset_name=str(tmp_path), task_column="task"))
    assert {split: len(found[split]) for split in found} == {"train": len(ROWS), "validation": len(ROWS)}
    with pytest.raises(ValueError, match="no split `test`; it has train, validation"):
        load_examples(DataArguments(dataset_name=str(tmp_path), validation_split="test"))


@pytest.mark.slow
def test_the_embedded_example_has_its_tasks_and_is_the_same_each_time():
    data = load_examples(DataArguments(task_column="task"))
    again = load_examples(DataArguments(task_column="task"))
    assert data["train"].to_list() == again["train"].to_list()
    tasks = data["train"]["task"][:]
    assert {task: tasks.count(task) for task in example.SHARES} == {
        "code": 1350,
        "docs": 990,
        "story": 420,
        "error": 240,
    }
    held_out = data["validation"]["task"][:]
    assert {task: held_out.count(task) for task in example.SHARES} == example.VALIDATION_EXAMPLES
    train = {(row["prompt"], row["completion"]) for row in data["train"] if row["task"] == "error"}
    assert not any((row["prompt"], row["completion"]) in train for row in data["validation"])


def test_an_installation_without_the_example_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(example, "_FOLDER", tmp_path)
    with pytest.raises(ValueError, match="clone the project"):
        example.example_path(example.MODEL)


def test_the_stories_about_lily_are_one_in_three():
    data = load_examples(DataArguments(task_column="task", example="lily"))
    for rows in data.values():
        assert all((example.HERO in row["completion"]) == (row["task"] == "lily") for row in rows)
    tasks = data["train"]["task"][:]
    assert {task: tasks.count(task) for task in set(tasks)} == {"lily": 911 - 64, "others": 2 * 911 - 64}
    assert not set(data["train"]["completion"]) & set(data["validation"]["completion"])

"""Errors that a user can fix are one sentence on stderr, with exit code 2, and leave no files behind."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_jd import JDTrainingArguments
from hf_jd.cli import main
from tests.cli.conftest import ROWS, write_jsonl


@pytest.fixture
def complaint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; return its message."""

    def run(*flags: str | Path, output: str = "out") -> str:
        before = sorted(tmp_path.rglob("*"))
        code = main(["finetune", *map(str, flags), "--output_dir", str(tmp_path / output), "--disable_tqdm", "true"])
        assert code == 2
        assert sorted(tmp_path.rglob("*")) == before
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("hf-jd finetune: error: ")
        assert message.endswith(".")
        return message

    return run


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--jd_weighting", "upgard"], ["'upgard'", "upgrad, "]),
        (["--jd_weigting", "upgrad"], ["`--jd_weigting`", "`--jd_weighting`"]),
        (["--jd_objectives", "groups"], ["`groups`", "`group`"]),
        (["--learning_rate", "fast"], ["learning_rate", "'fast'"]),
        (["--dtype", "int8"], ["'int8'", "float32"]),
        (["--lora_r", "0"], ["--lora_r is 0", "--full"]),
        (["--max_length", "1"], ["--max_length"]),
        (["--validation_file", "x.jsonl"], ["--train_file"]),
        (["--task_column", "task", "--jd_group_column", "kind"], ["`task`", "`kind`"]),
        (["missing.yaml"], ["missing.yaml", "No such file"]),
        (["--lr", "1e-3"], ["`--lr`", "`--learning_rate`"]),
        (["--batch-size", "1"], ["`--batch-size`", "`--per_device_train_batch_size`"]),
        (["--full", "--use_dora"], ["--use_dora", "leave out --full"]),
        (["--report_to", "nothing_like_it"], ["`nothing_like_it`", "isn't installed"]),
        (["--push_to_hub"], ["the Hub can't be pushed to", "`hf auth login`"]),
        (["--do_train", "false", "--train_file", __file__], ["no file to read at", ".jsonl"]),
    ],
)
def test_flags(complaint, flags, parts):
    message = complaint(*flags)
    assert all(part in message for part in parts), message


def test_no_output_folder(capsys):
    assert main(["finetune"]) == 2
    assert "--output_dir is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, text, parts",
    [
        ("data.jsonl", "", ["data.jsonl has no examples"]),
        ("data.csv", "prompt,completion\n", ["data.csv has no examples"]),
        ("data.jsonl", '{"text": "a"}\n\n{"text": "b"\n', ["data.jsonl is malformed: line 3 is not JSON"]),
        ("data.json", '[{"text": "a"},\n{"text": b}]', ["data.json is malformed: line 2 is not JSON"]),
        ("data.jsonl", '{"text": "a"}\n[1]\n', ["data.jsonl: example 2", "object"]),
        ("data.csv", "prompt,completion\na,b\na\n", ["data.csv is malformed", "columns in line 3"]),
        ("data.parquet", "PAR?", ["data.parquet is malformed"]),
        ("data.txt", "a", ["no file to read at", "data.txt", ".jsonl"]),
        ("data.jsonl", '{"question": "a", "labels": 1}\n', ["`prompt` and `completion`", "`question`, `labels`"]),
        ("data.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n', ["nothing to learn", "hf-jd dpo"]),
        ("data.jsonl", '{"text": "a"}\n{"text": null}\n{}\n', ["`text`", "rows 2, 3"]),
        ("data.jsonl", '{"text": "a"}\n{"text": 3}\n', ["no text in the column `text` of row 2"]),
        ("data.jsonl", '{"messages": "a"}\n', ["no list of messages in the column `messages` of row 1"]),
        ("data.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', ["no message with the role `assistant`"]),
        ("data.jsonl", '{"messages": [{"content": "a"}]}\n', ["a message without `role`", "row 1"]),
        ("data.jsonl", '{"messages": [{"role": "assistant", "content": null}]}\n', ["`content` as text", "row 1"]),
        ("data.jsonl", '{"conversations": [{"from": "gpt"}]}\n', ["`content` as text", "row 1"]),
        ("data.jsonl", '{"text": "a"}\n{"text": "b', ["line 2 is not JSON from column 10 on (Unterminated string)"]),
        ("data.jsonl.gz", '{"text": "a"}\n', ["data.jsonl.gz can't be read", "gzip"]),
        ("data.jsonl", '{"text": 1}\n{"text": 3}\n', ["`text`", "rows 1, 2"]),
        ("data.jsonl", '{"prompt": "a", "completion": ""}\n', ["No example has a token"]),
        ("data.jsonl", b'{"text": "\xff"}\n', ["data.jsonl is malformed: 'utf-8'"]),
    ],
)
def test_files(complaint, tmp_path, name, text, parts):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = complaint("--train_file", path, "--add_eos", "false")
    assert all(part in message for part in parts), message


def test_file_is_missing(complaint, tmp_path):
    assert "no file to read at" in complaint("--train_file", tmp_path / "no.jsonl")


def test_malformed_settings(complaint, tmp_path):
    (tmp_path / "a.yaml").write_text("lora_r: [1\n")
    assert "a.yaml is malformed" in complaint(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("lora_rank: 1\n")
    assert "`lora_rank` in the file; the nearest is `--lora_r`" in complaint(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("dtype: int8\n")
    assert "--dtype is `int8`; choose one of float32" in complaint(tmp_path / "a.yaml")


def test_what_isnt_installed_is_said(complaint, monkeypatch, train_file):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install bitsandbytes" in complaint("--load_in_4bit", "--train_file", train_file)


def test_processes_that_would_train_separately_are_refused(complaint, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = complaint()
    assert "2 processes were started, but they aren't connected" in message
    assert "--use_cpu" in message


def test_nothing_to_evaluate_on(complaint, train_file):
    assert "give --validation_file" in complaint("--train_file", train_file, "--do_train", "false")


def test_missing_task_column(complaint, train_file):
    message = complaint("--train_file", train_file, "--jd_group_column", "kind")
    assert "no column `kind`" in message
    assert "`task`, `prompt`, `completion`" in message


def test_task_column_with_missing_values(complaint, tmp_path):
    rows = [{**row, "task": None if i in (1, 4) else row["task"]} for i, row in enumerate(ROWS)]
    message = complaint("--train_file", write_jsonl(tmp_path / "a.jsonl", rows), "--task_column", "task")
    assert "`task` of rows 2, 5" in message


def test_folders_without_a_model(complaint, tmp_path, train_file):
    (tmp_path / "empty").mkdir()
    assert "holds no model" in complaint("--model_name_or_path", tmp_path / "empty")
    assert "no folder" in complaint("--model_name_or_path", tmp_path / "absent")
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "can't be loaded" in complaint("--model_name_or_path", tmp_path / "empty", "--train_file", train_file)


def test_no_parameter_to_train(complaint, train_file):
    message = complaint("--train_file", train_file, "--lora_target_modules", "no_such_layer")
    assert "LoRA can't be added" in message
    assert "no_such_layer" in message


def test_data_parallel(complaint, train_file, monkeypatch):
    monkeypatch.setattr(JDTrainingArguments, "n_gpu", property(lambda self: 2))
    assert "accelerate launch" in complaint("--train_file", train_file)


@pytest.mark.parametrize("part", ["trainer_state.json", "checkpoint-5"])
def test_folder_of_another_run(complaint, tmp_path, part):
    (tmp_path / "out" / part).mkdir(parents=True)
    message = complaint()
    assert "holds another run" in message
    assert "--resume_from_checkpoint last" in message
    assert "--overwrite_output_dir" in message


def test_another_run_survives_an_error_in_what_should_replace_it(complaint, tmp_path):
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    complaint("--overwrite_output_dir", "--train_file", tmp_path / "no.jsonl")


def test_nothing_to_resume(complaint, train_file):
    assert "holds no checkpoint" in complaint("--train_file", train_file, "--resume_from_checkpoint", "last")
    assert "no such folder" in complaint("--train_file", train_file, "--resume_from_checkpoint", "elsewhere")


def test_output_folder_is_a_file(complaint, tmp_path):
    (tmp_path / "out").write_text("")
    assert "is a file" in complaint()


def test_faults_of_other_libraries_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("hf_jd.finetune.run.finetune", lambda *args: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        main(["finetune", "--output_dir", "out"])

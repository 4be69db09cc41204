"""`hf-jd doctor` on the embedded model."""

import pytest

from hf_jd.cli import main
from hf_jd.finetune.doctor import report
from hf_jd.gramian import RowCheck

FLAGS = ["--use_cpu", "--per_device_train_batch_size", "3", "--max_length", "12"]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "Once upon a time"}\n{"text": "The dog ran"}\n{"text": "A red ball"}\n')
    return ["--train_file", str(file)]


def test_all_adapters_are_right(data, capsys, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *FLAGS, *data]) == 0
    assert "84 in closed form" in (out := capsys.readouterr().out)
    assert "All rows are right" in out
    assert "--validation_file" not in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_wrong_parameter_is_named():
    text = report([RowCheck("a.weight", 1, 0.0, True, "fine"), RowCheck("b.weight", 2, 0.5, False, "freeze it")])
    assert "b.weight: tier 2, WRONG (error 5.0e-01); freeze it" in text
    assert "1 of them WRONG" in text
    assert "a.weight" not in text

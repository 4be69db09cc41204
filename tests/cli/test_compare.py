"""`hf-jd compare`: plans, processes, table and picture."""

from __future__ import annotations

import json
import sys

import pytest

from hf_jd.cli import main
from hf_jd.finetune.processes import Job, run_jobs
from hf_jd.finetune.results import Evaluation, Results
from hf_jd.finetune.table import comparison_table, evaluation_table, markdown, spread


@pytest.fixture
def plan(train_file, tmp_path):
    path = tmp_path / "plan.json"
    base = {"train_file": str(train_file), "validation_file": str(train_file), "task_column": "task", "max_length": 16}
    sizes = {"per_device_train_batch_size": 4, "eval_on_start": True, "save_strategy": "no"}
    configurations = {"stock Trainer": {"stock": True}, "by task": {"jd_objectives": "group"}}
    path.write_text(json.dumps({"base": {**base, **sizes}, "configurations": configurations}))
    return path


@pytest.mark.slow
def test_compares_end_to_end(plan, tmp_path, capsys):
    folder = tmp_path / "comparison"
    assert main(["compare", str(plan), "--output_dir", str(folder), "--max_steps", "2"]) == 0
    printed = capsys.readouterr().out
    table = (folder / "table.md").read_text("utf-8")
    assert table in printed
    for line in (
        "validation loss",
        "before training",
        "always the most frequent token",
        "steps against the task, of 2",
    ):
        assert line in table
    assert table.count("| stock Trainer ") == 4  # loss, accuracy and, by its twin, conflicts and shares
    assert "x 1.00" in table
    results = json.loads((folder / "results.json").read_text("utf-8"))
    assert set(results["runs"]) == {"stock Trainer", "by task"}
    assert set(results["twins"]) == {"stock Trainer"}
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    apart = float(printed.partition("final losses differ by ")[2].split()[0])
    assert apart < 1e-3
    assert main(["compare", str(plan), "--output_dir", str(folder)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_wrong_flag_is_refused_before_anything_runs(plan, tmp_path, capsys):
    folder = tmp_path / "comparison"
    assert main(["compare", str(plan), "--output_dir", str(folder), "--jd_weighting", "upgard"]) == 2
    assert "'upgard'" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize("text", ["{}", "[]", '{"base": {}}', '{"configurations": {"a": {}}, "bases": {}}'])
def test_malformed_plans(tmp_path, capsys, text):
    (tmp_path / "plan.json").write_text(text)
    assert main(["compare", str(tmp_path / "plan.json"), "--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("hf-jd compare: error: ")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_never_removed(plan, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert main(["compare", str(plan), "--output_dir", str(tmp_path / "out"), "--overwrite"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.txt").exists()


def job(tmp_path, name, code):
    return Job(name, [sys.executable, "-c", code], tmp_path / f"{name}.txt")


def test_failing_runs_end_the_others(tmp_path):
    slow = job(tmp_path, "slow", "import time; time.sleep(60)")
    mend = job(tmp_path, "mend", "import sys; print('hf-jd finetune: error: Mend it.'); sys.exit(2)")
    with pytest.raises(ValueError, match="^mend: Mend it.$"):
        run_jobs([slow, mend], 2, {})
    with pytest.raises(RuntimeError, match="exit code 1"):
        run_jobs([job(tmp_path, "fault", "raise KeyError('x')")], 1, {})


def results(loss, seconds=None, against=None):
    evaluations = {"a": [Evaluation(0, 5.0, 0.1, 0.2), Evaluation(4, loss, 0.5, 0.2)]}
    series = {} if against is None else {"a": [(step, float(step <= against)) for step in range(1, 5)]}
    return Results(evaluations, {}, series, 4, [9.0, seconds, seconds] if seconds else [], 4)


def test_comparison_shows_mean_and_spread_over_seeds():
    runs = {"stock": [results(2.0, 1.0), results(2.0, 1.0)], "ours": [results(1.0, 1.5, 1), results(2.0, 1.5, 3)]}
    table = comparison_table(runs, {}, "stock")
    assert "1.50 ± 0.71" in table
    assert "1.50 s, x 1.50" in table
    assert "2 ± 1" in table


def test_one_run_shows_before_and_after():
    row = evaluation_table(results(1.0)).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["a", "5.000", "1.000", "10.0%", "50.0%"]


def test_columns_are_aligned():
    lines = markdown(["", "long name"], [["a", "1"], ["bcd", "22"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].endswith(":|") or lines[1].endswith(": |")


def test_spread_of_nothing_is_empty():
    assert spread([None, None], ".1f") == ""
    assert spread([1.0, None], ".1f") == "1.0"

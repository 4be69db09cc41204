"""`hf-jd compare`: plans, processes, table and picture."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hf_jd.cli import main
from hf_jd.finetune import compare
from hf_jd.finetune.comparison import Plan
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
    assert table.count("| stock Trainer ") == 4  # loss and accuracy, and from its twin, conflicts and shares
    assert "x 1.00" in table
    results = json.loads((folder / "results.json").read_text("utf-8"))
    assert set(results["runs"]) == {"stock Trainer", "by task"}
    assert set(results["twins"]) == {"stock Trainer"}
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    apart = float(printed.partition("final losses differ by ")[2].split()[0])
    assert apart < 1e-3
    assert main(["compare", str(plan), "--output_dir", str(folder)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_one_seed_for_all_runs_is_refused(plan, tmp_path, capsys):
    assert main(["compare", str(plan), "--output_dir", str(tmp_path / "out"), "--seed", "2"]) == 2
    assert "--seeds N runs each configuration" in capsys.readouterr().err


def test_a_wrong_flag_is_refused_before_anything_runs(plan, tmp_path, capsys):
    folder = tmp_path / "comparison"
    assert main(["compare", str(plan), "--output_dir", str(folder), "--jd_weighting", "upgard"]) == 2
    assert "'upgard'" in capsys.readouterr().err
    settings = json.loads(plan.read_text())
    settings["configurations"]["by task"]["jd_weigting"] = "mgda"
    plan.write_text(json.dumps(settings))
    assert main(["compare", str(plan), "--output_dir", str(folder)]) == 2
    assert "hf-jd compare: error: by task: Unknown flag `jd_weigting` in the file" in capsys.readouterr().err
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


# ---- Interrupted comparisons ----


class Machine:
    """A stand-in for `run_jobs` that trains nothing, and stops after `until` runs."""

    def __init__(self):
        self.made: list[str] = []
        self.until: int | None = None

    def __call__(self, jobs, processes, environment, finished):
        for job in jobs:
            if len(self.made) == self.until:
                raise KeyboardInterrupt
            self.made.append(job.name)
            evaluations = [
                {"step": step, "eval_story_loss": 0.5 * 4**step, "eval_sum_loss": 2.0 ** (step + 1)} for step in (0, 2)
            ]
            state = {"global_step": 2, "log_history": [*evaluations, {"step": 1, "jd/against/sum": 1.0}]}
            (job.log.parent / "trainer_state.json").write_text(json.dumps(state))
            finished(job)


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(compare, "run_jobs", machine)
    return machine


def test_what_is_finished_is_not_run_again(plan, tmp_path, machine, capsys):
    command = ["compare", str(plan), "--seeds", "2", "--output_dir", str(tmp_path / "out")]
    machine.until = 2
    assert main(command) == 130
    assert "add --resume to the same command" in capsys.readouterr().err
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    machine.until = None
    assert main([*command, "--resume"]) == 0
    assert "2 of 6 runs are already done" in capsys.readouterr().out
    assert sorted(machine.made) == sorted(
        f"{name}, seed {seed}" for name in ("stock Trainer", "stock Trainer (twin)", "by task") for seed in (0, 1)
    )
    machine.made.clear()
    assert main([*command, "--resume", "--seeds", "3"]) == 0
    assert [name[-1] for name in machine.made] == ["2"] * 3


def test_runs_of_other_flags_are_not_mixed(plan, tmp_path, machine, capsys):
    command = ["compare", str(plan), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--max_steps", "2"]) == 0
    assert main([*command, "--max_steps", "3", "--resume"]) == 2
    assert "command line" in capsys.readouterr().err
    settings = json.loads(plan.read_text())
    settings["base"]["max_length"] = 17
    plan.write_text(json.dumps(settings))
    assert main([*command, "--max_steps", "2", "--resume"]) == 2
    assert "(max_length)" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.json").exists()


# ---- Variants and trade-offs ----


def with_parts(plan: Path, **parts) -> Path:
    plan.write_text(json.dumps(json.loads(plan.read_text()) | parts))
    return plan


def test_each_configuration_is_run_with_each_variant(plan, tmp_path):
    variants = {"slow": {"learning_rate": 1e-4}, "fast": {"learning_rate": 1e-3, "jd_objectives": "instance"}}
    runs = Plan.read(with_parts(plan, variants=variants)).runs(tmp_path, 2)
    assert len({run.folder for run in runs}) == len(runs) == 2 * (2 + 1) * 2  # There is a twin, too.
    (fast,) = [run for run in runs if run.name == "by task, fast, seed 1"]
    assert fast.settings["learning_rate"] == 1e-3
    assert fast.settings["jd_objectives"] == "instance"  # A variant's flags override the configuration's.


def test_a_tradeoff_has_its_own_table_and_picture(plan, tmp_path, machine, capsys):
    tradeoff = {"forget": "story", "keep": "sum", "until": 2.0}
    variants = {"slow": {"learning_rate": 1e-4}, "fast": {"learning_rate": 1e-3}}
    command = ["compare", str(with_parts(plan, tradeoff=tradeoff, variants=variants)), "--output_dir"]
    assert main([*command, str(tmp_path / "out")]) == 0
    table = (tmp_path / "out" / "table.md").read_text("utf-8")
    assert table in capsys.readouterr().out
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()}
    assert rows["before training"][::2][:2] == ["0.50", "2.00"]
    # From 0.5 to 8 in two steps: 2 is halfway between them in logarithms, and so is 4 between 2 and 8.
    assert rows["by task"] == ["8.00", "nan%", "8.00", "nan%", "4.00", "1", "", "1"]
    assert list(rows).index("**slow**") < list(rows).index("**fast**")
    assert (tmp_path / "out" / "picture.png").read_bytes().startswith(b"\x89PNG")
    with_parts(plan, tradeoff=tradeoff | {"until": 100})
    assert main([*command, str(tmp_path / "never")]) == 0
    assert "never" in capsys.readouterr().out
    with_parts(plan, tradeoff=tradeoff | {"keep": "sums"})
    assert main([*command, str(tmp_path / "other")]) == 2
    assert "`sums`; the evaluated tasks are story, sum" in capsys.readouterr().err


@pytest.mark.parametrize(
    "parts",
    [
        {"tradeoff": {"forget": "story"}},
        {"tradeoff": {"forget": "story", "keep": "sum", "until": "late"}},
        {"variants": {"a": 3}},
        {"configurations": {"a b": {}, "a-b": {}}},
    ],
)
def test_malformed_parts_of_plans(plan, tmp_path, capsys, parts):
    assert main(["compare", str(with_parts(plan, **parts)), "--output_dir", str(tmp_path / "out")]) == 2
    assert "plan.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- Processes ----


def job(tmp_path, name, code):
    return Job(name, [sys.executable, "-c", code], tmp_path / f"{name}.txt")


def test_failing_runs_end_the_others(tmp_path):
    ended: list[Job] = []
    slow = job(tmp_path, "slow", "import time; time.sleep(60)")
    mend = job(tmp_path, "mend", "import sys; print('hf-jd finetune: error: Mend it.\\nBye.'); sys.exit(2)")
    with pytest.raises(ValueError, match="^mend: Mend it.$"):
        run_jobs([slow, mend], 2, {}, ended.append)
    with pytest.raises(RuntimeError, match="exit code 1"):
        run_jobs([job(tmp_path, "fault", "raise KeyError('x')")], 1, {}, ended.append)
    assert not ended


def test_sigterm_ends_the_runs_too(tmp_path):
    ready = tmp_path / "ready"
    code = f"import pathlib, time; pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    parent = (
        "import sys; from pathlib import Path; from hf_jd.finetune.processes import Job, run_jobs\n"
        f"run_jobs([Job('slow', [sys.executable, '-c', {code!r}], Path({str(tmp_path / 'log')!r}))], 1, {{}}, print)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.02)
    (child,) = psutil.Process(process.pid).children()
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not child.is_running()


def results(loss, seconds=None, against=None):
    evaluations = {"a": [Evaluation(0, 5.0, 0.1, 0.2), Evaluation(4, loss, 0.5, 0.2)]}
    series = {} if against is None else {"a": [(step, float(step <= against)) for step in range(1, 5)]}
    return Results(evaluations, {}, series, 4, [9.0, seconds, seconds] if seconds else [])


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


def test_a_run_that_diverged_has_no_deviation():
    assert spread([1.0, float("nan")], ".1f") == "nan"
    assert spread([1.0, float("inf")], ".1f") == "inf"

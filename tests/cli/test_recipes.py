"""Each file of `examples/` does what it says, for a few steps."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from datasets import Dataset, DatasetDict

from hf_jd.cli import main
from hf_jd.finetune import data as finetune_data
from hf_jd.finetune import example
from hf_jd.finetune.comparison import Plan
from hf_jd.finetune.parser import read_settings
from hf_jd.finetune.run import parse
from tests.cli.conftest import ROWS

EXAMPLES = Path(__file__).parents[2] / "examples"
# Plans of rewards: tests/cli/test_compare_rewards.py runs the plan.
RECIPES = sorted(path for path in EXAMPLES.glob("*.yaml") if not path.stem.endswith("rewards"))
PLANS = [path for path in RECIPES if "configurations" in read_settings(path)]
SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "6", "--max_length", "12", "--eval_strategy", "no"]
SHORT += ["--eval_on_start", "false", "--logging_steps", "1", "--disable_tqdm", "true"]
STORIES = [
    {"task": task, "prompt": "", "completion": row["completion"]}
    for row, task in zip(ROWS, ["lily", "others"] * 4, strict=True)
]
ERRORS = [(f"... is not valid: {i} =", f" {kind}") for i, kind in enumerate(["value", "type", "state"] * 80)]


def few(name: str) -> DatasetDict:
    """Replace an embedded example, since reading the whole standard library is slow."""
    rows = {"tasks": [row | {"task": task} for row in ROWS for task in example.SHARES], "lily": STORIES * 3}[name]
    rows = Dataset.from_list(rows)
    return DatasetDict(train=rows, validation=rows.select(range(8)))


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(finetune_data, "example_data", few)
    monkeypatch.setattr(example, "example_data", few)
    monkeypatch.setattr(example, "example_texts", lambda: {"error": ERRORS})


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")) + sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_a_recipe_opens_with_what_why_how_to_run_and_what_to_see(path):
    head = path.read_text("utf-8")[:1500]
    places = [head.find(word) for word in ("What:", "Why:", "Run:", "See:")]
    assert -1 not in places
    assert places == sorted(places)
    assert f"examples/{path.name}" in head


@pytest.mark.parametrize("path", [path for path in RECIPES if path not in PLANS], ids=lambda path: path.stem)
def test_a_recipe_runs(path, tmp_path, capsys):
    assert main(["finetune", str(path), "--output_dir", str(tmp_path / "run"), *SHORT]) == 0
    assert "steps against it" in capsys.readouterr().out
    assert (tmp_path / "run" / "README.md").exists()


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_is_well_formed_and_its_last_run_trains(path, tmp_path):
    runs = Plan.read(path).runs(tmp_path, 1)
    for run in runs:
        parse([], run.settings)
    file = tmp_path / "flags.json"
    file.write_text(json.dumps(runs[-1].settings))
    assert main(["finetune", str(file), "--output_dir", str(tmp_path / "run"), *SHORT]) == 0


def test_rare_classes_example_runs(tmp_path):
    metrics = script("rare_classes").main(["--max_steps", "2", "--output_dir", str(tmp_path), "--report_to", "none"])
    assert {"eval_recall", *(f"eval_recall_{name}" for name in ("value", "type", "state"))} <= metrics.keys()


def test_trl_sft_example_runs(tmp_path):
    pytest.importorskip("trl")
    flags = ["--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "8", "--max_length", "12"]
    trainer = script("trl_sft").main([*flags, "--output_dir", str(tmp_path), "--report_to", "none"])
    logged = set().union(*trainer.state.log_history)
    assert {"mean_token_accuracy", *(f"jd/against/{task}" for task in example.SHARES)} <= logged

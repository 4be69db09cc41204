"""`scripts/compare_rewards.py`: how it summarises a run, and a small comparison."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from tests.marks import slow

pytest.importorskip("trl", reason="TRL 1.16 asks for datasets 4.7")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("compare_rewards")


@pytest.fixture
def rewards(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("studies.reward_functions")


def test_a_run_is_summarised(script):
    assert script.summary([0.0, 0.0]) == {"worst": 0.0, "improved": 0, "hypervolume": 1.0}
    assert script.summary([3.0, -1.5])["hypervolume"] == 1.0
    assert script.summary([1.0, -4.0])["hypervolume"] == 0.0


def test_rewards_score_completions(rewards):
    assert rewards.short([""], ["One two. Three four!"]) == [-2.0]
    assert rewards.long([""], ["One two. Three four!"]) == [2.0]
    assert rewards.word("happy")(["", ""], ["Happy, happy", "sad"]) == [1.0, 0.0]
    assert rewards.dialogue(["", ""], ['"Hi"', "Hi"]) == [1.0, 0.0]
    assert rewards.narration(["", ""], ['"Hi"', "Hi"]) == [0.0, 1.0]
    assert rewards.named("dialogue", rewards.dialogue, 100)([""], ['"Hi"'], kind=["a"]) == [100.0]
    assert rewards.variety([""], ["a a b c"]) == [0.75]
    assert rewards.brief([""], ["one two three"]) == [-3.0]
    assert rewards.equation(["", ""], ["3 + 4 = 8", "3 + 4 is 7"]) == [1.0, 0.0]
    answers = ["7", "It is 3 + 4 = 7.", "It is 8, not 7, nor 6.", "seven"]
    assert rewards.right(["What is 3 + 4?"] * 4, answers) == [1.0, 1.0, 0.0, 0.0]
    assert rewards.right(["What is it?"], ["7"]) == [0.0]


def test_a_table_of_many_rewards_has_a_column_per_method(script):
    run = {"seed": 0, "learning_rate": 1e-3, "rewards": list("abcdefghi"), "changes": [1.0] * 8 + [-1.0]}
    lines = script.table([run | {"method": "one"}, run | {"method": "two"}]).splitlines()
    assert lines[:2] == ["| method | one | two |", "| --- | --- | --- |"]
    assert lines[-4] == "| i | -1.00 | -1.00 |"
    assert lines[-2] == "| improved | 8.00 | 8.00 |"


def test_a_table_has_spreads_and_paired_differences(script):
    run = {"learning_rate": 1e-3, "rewards": ["a", "b"]}
    changes = {("one", 0): [1.0, -1.0], ("one", 1): [1.0, 0.0], ("two", 0): [1.0, 0.5], ("two", 1): [0.5, 2.0]}
    results = [run | {"method": m, "seed": seed, "changes": c} for (m, seed), c in changes.items()]
    header, _, one, two = script.table(results, "one").splitlines()
    assert header.endswith("| a | b | worst | improved | hypervolume | worst, less `one` |")
    assert one.startswith("| one | 0.001 | 2 | 1.00 | -0.50 | -0.50 ± 0.71 | 1.00 ± 0.00 |")
    assert one.endswith("|  |")
    assert two.endswith("| +1.00 ± 0.71; 2 of 2 |")


@pytest.mark.parametrize(("flag", "unknown"), [("methods", "upgrd"), ("rewards", "tall")])
def test_an_unknown_name_is_refused(flag, unknown, script, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main([str(ROOT / "examples" / "rewards.yaml"), f"--{flag}", unknown])
    assert f"there is no {flag[:-1]} `{unknown}`" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("names", [slow(["upgrad", "sum, then normalise"])])
@pytest.mark.parametrize("example", ["rewards", "many_rewards", "chat_rewards"])
def test_a_small_comparison_runs_and_resumes(example, names, script, tmp_path):
    plan = yaml.safe_load((ROOT / "examples" / f"{example}.yaml").read_text("utf-8"))
    model = shutil.copytree(ROOT / "examples" / "stories15m", tmp_path / "model")
    (model / "chat_template.jinja").write_text("User: {{ messages[0].content }} Answer:", "utf-8")
    plan |= {"model": str(model), "seeds": [0], "learning_rates": [1e-3], "evaluated": 2}
    plan["trainer"] |= {"max_steps": 1, "max_completion_length": 4}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False), "utf-8")
    words = [str(tmp_path / "plan.yaml"), "--output_dir", str(tmp_path / "out"), "--methods", *names]
    assert script.main(words) == 0
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [r["method"] for r in results] == names
    assert all(len(r["changes"]) == len(plan["rewards"]) and len(r["way"]) == 1 for r in results)
    assert script.main(words) == 0  # Finished runs are not repeated.
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 2
    assert all(name in (tmp_path / "out" / "table.md").read_text() for name in names)
    assert (tmp_path / "out" / "picture.png").exists()
    some = list(plan["rewards"])[1:]
    assert script.main([*words[:-1], "--rewards", *some]) == 0  # Fewer rewards are another study.
    assert script.main([*words[:-1], "--rewards", *some]) == 0
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [r["rewards"] for r in results] == [list(plan["rewards"])] * 2 + [some]

"""`scripts/evidence.py`: its plans, its data, how it summarises runs, and each study in miniature."""

from __future__ import annotations

import json
import math
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from transformers import HfArgumentParser
from transformers.utils import logging

from hf_jd import JDTrainingArguments
from hf_jd.finetune.run import parse
from tests.marks import slow

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / "examples" / "evidence").glob("*.yaml"))
PAGE = (ROOT / "docs" / "evidence.md").read_text("utf-8")
OWN_FLAGS = {
    "tuning": ("data", "npo", "replay", "share", "repeat"),
    "rare": ("gamma", "class_power"),
    "preferences": ("opposed", "shares"),
}


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")

    def load(name: str) -> ModuleType:
        return import_module(name)

    return load


def runs_of(plan: Any, values: dict[tuple[str, int], float | None]) -> list[dict[str, Any]]:
    return [
        {"variant": "", "configuration": name, "seed": seed, "measures": {plan.measure: value}}
        for (name, seed), value in values.items()
    ]


def arguments_of(study: str) -> type:
    if study != "preferences":
        return JDTrainingArguments
    pytest.importorskip("trl", reason="TRL 1.16 asks for datasets 4.7")
    from hf_jd.trainer.trl.trainers import JDDPOConfig

    return JDDPOConfig


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_flags_of_every_run_are_allowed(path, studies, tmp_path):
    plan = studies("studies.plan").Plan.read(path)
    for run in plan.runs():
        flags = plan.flags(run) | {"seed": run["seed"], "output_dir": str(tmp_path)}
        flags = {name: value for name, value in flags.items() if name not in OWN_FLAGS[plan.study]}
        if plan.study == "tuning":
            parse([], flags)
        else:
            HfArgumentParser(arguments_of(plan.study)).parse_dict(flags)  # ty: ignore[invalid-argument-type]


@pytest.mark.parametrize("path", [path for path in PLANS if f"<!-- {path.stem}:" in PAGE], ids=lambda path: path.stem)
def test_the_page_has_a_row_per_method_and_the_picture(path, studies):
    table = PAGE.partition(f"<!-- {path.stem}:")[2].partition(f"<!-- /{path.stem}")[0]
    rows = {
        line.split("|")[1].strip().removesuffix(" (best of the sweep)") for line in table.splitlines() if "|" in line
    }
    plan = studies("studies.plan").Plan.read(path)
    assert set(plan.configurations) <= rows
    assert (ROOT / "docs" / "images" / f"{path.stem}.png").exists()


def test_a_plan_that_names_an_unknown_control_is_refused(studies, tmp_path):
    parts = yaml.safe_load(PLANS[0].read_text("utf-8")) | {"control": "nothing"}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(parts, sort_keys=False), "utf-8")
    with pytest.raises(ValueError, match="names nothing, which is no configuration"):
        studies("studies.plan").Plan.read(tmp_path / "plan.yaml")


def test_differences_are_paired_and_the_best_of_the_sweep_is_a_control(studies):
    plan = studies("studies.plan").Plan(
        study="tuning", measure="loss", better="lower", shown={"loss": ".1f"}, control="a", base={},
        configurations={"a": {}, "b": {}, "c": {}, "d": {}}, sweep=["b", "c"], seeds=2,
    )  # fmt: skip
    values = {("a", 0): 3.0, ("a", 1): 5.0, ("b", 0): 2.0, ("b", 1): 6.0, ("c", 0): 1.0, ("c", 1): None}
    results = runs_of(plan, values | {("d", 0): 1.0, ("d", 1): 4.0})
    lines = studies("studies.table").table(plan, results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[3] == ["b (best of the sweep)", "4.0 ± 2.8", "+0.0 ± 1.4; 1 of 2", ""]  # c is lower, on one seed only
    assert cells[4][1] == "1.0 (1 of 2)"
    assert cells[5][2:] == ["-1.5 ± 0.7; 2 of 2", "-1.5 ± 0.7; 2 of 2"]


def test_one_loss_is_read_where_the_other_reaches_a_value(studies):
    loss_at = studies("studies.table").loss_at
    falling, told = [(0, 8.0), (5, 4.0), (10, 1.0)], [(0, 1.0), (5, 2.0), (10, 8.0)]
    assert loss_at(falling, told, 2.0) == pytest.approx(4.0)
    assert loss_at(falling, told, 8.0) == pytest.approx(1.0)
    assert loss_at(falling[::-1], told, 2.0) == pytest.approx(math.sqrt(2))
    assert loss_at(falling, told, 0.5) is None


def test_study_data_has_the_stated_shares(studies):
    data = studies("studies.data")
    story = "The girl was happy, and she had a very big day."
    assert data.swapped(story) == "A boy is sad, and he has the not little night."
    assert data.swapped(data.swapped(story)) == story
    splits = data.new_style(seed=1, replay=4, new=100)
    old = [row["completion"] for row in splits["train"] if row["task"] == "old"]
    assert (len(old), len(set(old)), len(splits["train"])) == (100, 4, 200)
    splits = data.refusals(seed=1, share=0.04, repeat=4)
    trained = [row["prompt"] for row in splits["train"] if row["task"] == "refusal"]
    assert (len(set(trained)), len(trained), len(splits["train"])) == (20, 80, 560)
    assert not set(trained) & {row["prompt"] for row in splits["validation"] if row["task"] == "refusal"}


def test_a_pair_is_ranked_by_its_group(studies):
    data, held_out = studies("studies.preferences").pairs(seed=1, opposed=0.25, shares=[40, 20])
    assert [sum(row["task"] == group for row in data) for group in ("helpful", "brief")] == [40, 20]
    opposed = 0
    for helpful, brief in zip(held_out["helpful"], held_out["brief"], strict=True):
        assert helpful["prompt"] == brief["prompt"]
        assert len(brief["chosen"]) < len(brief["rejected"])
        assert {helpful["chosen"], helpful["rejected"]} == {brief["chosen"], brief["rejected"]}
        opposed += helpful["chosen"] == brief["rejected"]
    assert opposed == len(held_out["helpful"]) / 4
    assert not {row["prompt"] + row["chosen"] for row in data} & {
        row["prompt"] + row["chosen"] for rows in held_out.values() for row in rows
    }


def test_twenty_tasks_have_their_answers(studies):
    ask = studies("studies.tasks").ask
    story = "Once, a girl met Tom. They went to the old park to see a big dog. It was happy."
    answers = {
        "copy": "Once a girl met Tom They went to the old park to",
        "continue": "see a big dog. It was happy.",
        "reverse": "to park old the to went They Tom met girl a Once",
        "sort": "a girl met old Once park the They to to Tom went",
        "skip": "Once girl Tom went the park",
        "squeeze": "Onc  grl mt Tm Thy wnt t th ld prk t",
        "initials": "O a g m T T w t t o p t",
        "lengths": "four one four three three four four two three three four two",
        "spell": "t o",
        "longest": "Once",
        "next": "see",
        "capital": "Tom",
        "girl": "yes",
        "once": "yes",
        "count": "five",
    }
    for task, answer in answers.items():
        row = ask(task, story)
        assert row["prompt"] == f"{task}: Once a girl met Tom They went to the old park to ="
        assert row["completion"] == f" {answer}"
    splits = studies("studies.data").many_tasks(seed=1, examples=3, held_out=2)
    assert [len(splits[split]) for split in ("train", "validation")] == [60, 40]


def test_tasks_that_end_better_than_the_control_are_counted(studies):
    def run(name: str, seed: int, *ends: float) -> dict[str, Any]:
        way = {f"task {i}": [(0, 9.0), (5, end)] for i, end in enumerate(ends)}
        return {"variant": "", "configuration": name, "seed": seed, "measures": {}, "way": way}

    results = [run("a", 0, 1, 2, 3), run("a", 1, 3, 2, 1), run("b", 0, 0, 2, 1), run("b", 1, 2, 3, 2)]
    studies("studies.table").add_tasks_better(results, "a")
    assert [result["measures"].get("tasks better than `a`") for result in results] == [None, None, 2, 1]


def test_f1_of_each_class(studies):
    scores = studies("studies.rare").scores
    prediction = type(
        "", (), {"predictions": torch.eye(3)[[0, 0, 1, 1]].numpy(), "label_ids": torch.tensor([0, 2, 1, 1])}
    )
    measured = scores(prediction)
    assert measured["F1 of value"] == pytest.approx(2 / 3)
    assert (measured["F1 of type"], measured["F1 of state"], measured["accuracy"]) == (1.0, 0.0, 0.75)
    assert measured["macro F1"] == pytest.approx(5 / 9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", [slow(path) for path in PLANS], ids=lambda path: path.stem)
def test_a_study_runs_in_miniature(path, studies, tmp_path, request):
    parts = yaml.safe_load(path.read_text("utf-8"))
    first = [*dict.fromkeys([parts["control"], *parts["sweep"][:1], list(parts["configurations"])[-1]])]
    parts["configurations"] = {name: parts["configurations"][name] for name in first}
    parts["sweep"] = parts["sweep"][:1]
    parts["variants"] = dict(list(parts.get("variants", {"": {}}).items())[-1:])
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(parts, sort_keys=False), "utf-8")
    arguments_of(parts["study"])
    main = studies("evidence").main
    verbosity = logging.get_verbosity()
    request.addfinalizer(lambda: logging.set_verbosity(verbosity))
    request.addfinalizer(logging.enable_progress_bar)
    words = [str(tmp_path / "plan.yaml"), "--output_dir", str(tmp_path / "out"), "--seeds", "1", "--max_steps", "2"]
    assert main(words) == 0
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text("utf-8").splitlines()]
    assert [result["configuration"] for result in results] == first
    of_a_run = {name for name in parts["shown"] if " where " not in name and " than " not in name}
    assert of_a_run <= set(results[0]["measures"])
    assert (tmp_path / "out" / "picture.png").exists()
    assert main(words) == 0  # Finished runs are not repeated.
    assert len((tmp_path / "out" / "results.jsonl").read_text("utf-8").splitlines()) == len(first)

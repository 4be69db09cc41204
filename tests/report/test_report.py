from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_jd.cli import main
from hf_jd.report import figures
from hf_jd.report.history import History
from hf_jd.report.verdict import setup
from tests.report.runs import FORTY, entry, write_log, write_run


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    monkeypatch.setattr(figures, "DOTS", 40)


FIGURES = {"losses", "weights", "conflicts", "conflicts_over_time", "pairs_over_time", "norms"}


def test_pictures_and_a_page_that_stands_alone(tmp_path, capsys):
    write_run(tmp_path, ["code", "docs", "story"])
    assert main(["report", str(tmp_path)]) == 0
    folder = tmp_path / "report"
    assert str(folder / "index.html") in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"index.html", *(f"{name}.png" for name in FIGURES)}
    html = (folder / "index.html").read_text("utf-8")
    assert not re.search(r"""(?:src|href|srcset)=["'](?!data:)""", html)
    assert "url(" not in html
    assert html.count("<img ") == len(FIGURES)
    assert all((folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in FIGURES)


def test_forty_groups_of_a_killed_run(tmp_path):
    write_run(tmp_path, FORTY, finished=False)
    assert main(["report", str(tmp_path)]) == 0
    html = (tmp_path / "report" / "index.html").read_text("utf-8")
    assert "running, or ended early" in html
    assert html.count("<tr><td>task") == 40
    assert "of &lt;many&gt; &amp;" in html
    assert "<many>" not in html


def test_long_names_that_begin_alike_have_a_row_each():
    history = History(Path(), Path())
    names = [f"a name that is far too long to be drawn {i:02d}" for i in range(20)]
    for step in range(1, 9):
        history.add(entry(step, names))
    rows = figures.weights(history).axes[0].get_yticklabels()
    assert len({label.get_text() for label in rows}) == 20
    pairs = figures.pairs(history).axes[0].get_yticklabels()
    assert len({label.get_text() for label in pairs}) == figures.PAIRS


def test_numbers_of_the_table(tmp_path):
    write_run(tmp_path, ["a", "b"], steps=4)
    main(["report", str(tmp_path)])
    html = (tmp_path / "report" / "index.html").read_text("utf-8")
    assert "<tr><td>b</td><td>2</td><td>0.5</td><td>50.0%</td><td>1.5</td><td>100%</td></tr>" in html


@pytest.mark.parametrize("groups, steps", [(0, 1), (0, 700), (1, 2), (2, 1), (8, 700), (9, 1), (9, 700)])
def test_runs_of_all_sizes(groups, steps, tmp_path):
    write_run(tmp_path, [f"g{i}" for i in range(groups)], steps=steps)
    assert main(["report", str(tmp_path), "--output_dir", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "losses.png").exists() == (groups > 0 or steps > 1)
    assert not (tmp_path / "report").exists()


def test_a_single_log_is_drawn_as_dots_and_without_curves():
    history = History().add(entry(1, ["a", "b"]))
    figure = figures.losses(history)
    assert [line.get_marker() for line in figure.axes[0].lines] == ["o", "o"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b  2", "a  1"]  # as high as their ends
    assert figures.conflicts(history) is None


FACTS = {"model": "llm", "data": "d.jsonl", "lora_r": 8, "learning_rate": 2e-4, "jd_weighting": "upgrad"}
FACTS |= {"jd_objectives": "instance"}


@pytest.mark.parametrize(
    "weighting, against, conflicts, parts",
    [
        ("mean", 0.25, 0.3, ["25% of the steps went against b", "UPGrad would have prevented"]),
        ("krum", 0.25, 0.3, ["25% of the steps went against b", "guarantees nothing for whole groups"]),
        ("mean", 0.0, 0.3, ["No steps went against a group", "the mean does well enough"]),
        (
            "upgrad",
            0.0,
            0.3,
            ["No steps went against a group, although 30% of the pairs", "that is as it should be"],
        ),
        ("upgrad", 0.0, 0.01, ["hardly any conflict: the mean of the losses would have done as well"]),
    ],
)
def test_the_verdict(weighting, against, conflicts, parts, tmp_path):
    cosines = {"pairs": {"names": ["a", "b"], "cosines": [0.1]}}
    entries = [entry(step, ["a", "b"], **cosines) for step in (1, 2)]
    write_log(tmp_path, [one | {"jd/conflicts": conflicts, "jd/against/b": against} for one in entries])
    (tmp_path / "jd_run.json").write_text(json.dumps(FACTS | {"jd_weighting": weighting}))
    main(["report", str(tmp_path)])
    html = (tmp_path / "report" / "index.html").read_text("utf-8")
    html = " ".join(html.split())
    assert all(part in html for part in parts)
    assert f"llm (LoRA, r = 8) on d.jsonl; {weighting}, one objective per example; learning rate 0.0002" in html
    assert ("whose gradients are mostly noise" in html) == (conflicts > 0.1)


@pytest.mark.parametrize(
    "flags, name",
    [({"jd_objectives": "group", "jd_group_column": "kind"}, "kind"), ({"jd_objectives": "reward"}, "reward")],
)
def test_the_setup_says_what_an_objective_is(flags, name):
    assert f"; mgda, one objective per {name}; " in setup(FACTS | {"jd_weighting": "mgda"} | flags)


def test_values_that_cannot_be_drawn(tmp_path):
    infinite, groups = float("inf"), ["a", "\u8a9e", "c"]
    entries = [entry(1, groups, begins="anew"), entry(2, groups)]
    for name, value in zip(groups, (infinite, 0.0, -1.0), strict=True):
        entries[1] |= {f"jd/loss/{name}": value, f"jd/grad_norm/{name}": value}
    entries[1]["pairs"]["cosines"] = [None, None, float("nan")]
    write_log(tmp_path, entries)
    assert main(["report", str(tmp_path)]) == 0


def test_a_stock_run_has_losses_only(tmp_path):
    write_log(tmp_path, [{"step": step, "loss": 1 / step} for step in range(1, 9)])
    assert main(["report", str(tmp_path)]) == 0
    html = (tmp_path / "report" / "index.html").read_text("utf-8")
    assert "weights, conflicts between groups, conflicts over time, pairs of groups over time, norms of rows." in html
    assert html.count("<img ") == 1
    assert "The training loss of all objectives together." in html


def test_the_loss_of_a_run_by_reward_is_a_policy_loss(tmp_path):
    by_reward = {"jd/weight/short": 0.5, "jd/weight/happy": 0.5}
    write_log(tmp_path, [{"step": step, "loss": 0.0, **by_reward} for step in range(1, 9)])
    (tmp_path / "jd_run.json").write_text(json.dumps({"jd_objectives": "reward"}))
    assert main(["report", str(tmp_path)]) == 0
    html = (tmp_path / "report" / "index.html").read_text("utf-8")
    assert "The policy loss of all objectives together." in html
    assert "rewards/NAME/mean" in html
    assert "per token" not in html


def test_a_folder_without_logs_is_left_as_it_was(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no logs of a run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written(tmp_path, capsys):
    write_run(tmp_path, ["a", "b"], steps=2)
    (tmp_path / "file").write_text("")
    assert main(["report", str(tmp_path), "--output_dir", str(tmp_path / "file")]) == 2
    assert "can't be written to" in capsys.readouterr().err


def test_no_matplotlib(tmp_path, capsys, monkeypatch):
    write_run(tmp_path, ["a", "b"], steps=2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["report", str(tmp_path)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_report_needs_no_torch(tmp_path):
    write_run(tmp_path, ["a", "b"], steps=2)
    code = (
        f"import sys; from hf_jd.cli import main; assert main(['report', {str(tmp_path)!r}]) == 0; "
        "assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

"""The plans in `examples/gpu`: their flags, their data and their rewards; none of them is run."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from hf_jd.cli import main
from hf_jd.finetune.comparison import Plan
from hf_jd.finetune.data import read_files
from hf_jd.finetune.run import parse

ROOT = Path(__file__).parents[2]
GPU = ROOT / "examples" / "gpu"


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize(("name", "full", "forgotten"), [("tofu", True, "forget10"), ("wmdp", False, "forget")])
def test_a_comparison_has_only_flags_of_finetune(name, full, forgotten, tmp_path):
    for run in Plan.read(GPU / f"{name}.yaml").runs(tmp_path, seeds=1):
        model, _, _, training = parse(["--use_cpu", "true", "--bf16", "false"], run.settings)
        assert model.full == full
        assert (training.jd_ascend, training.jd_group_column) == ([forgotten], "task")


def test_a_grpo_plan_has_only_flags_of_its_command(tmp_path):
    pytest.importorskip("trl", reason="TRL 1.16 asks for datasets 4.7")
    from trl.scripts.grpo import GRPOScriptArguments

    from hf_jd.commands.common import parse as parse_command
    from hf_jd.commands.grpo import reward_function
    from hf_jd.trainer.trl.trainers import JDGRPOConfig

    words = ["--config", str(GPU / "grpo.yaml"), "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    script, args, model, _ = parse_command("grpo", words, GRPOScriptArguments, JDGRPOConfig)
    assert args.jd_objectives == "reward"
    assert model.use_peft
    rewards = {name.rpartition(".")[2]: reward_function(name) for name in script.reward_funcs}
    texts = ["a big dog", [{"role": "assistant", "content": "dog dog Dog a"}], ""]
    assert rewards["brief"](texts) == [-3, -4, 0]
    assert rewards["varied"](texts) == [1, 0.5, 0]
    assert rewards["plain"](texts) == [pytest.approx(-7 / 3), -2.5, 0]


def test_tofu_becomes_chats_with_equal_shares(monkeypatch, tmp_path):
    script = import_module("examples.gpu.unlearning_data")
    sizes = {"forget10": 4, "retain90": 36}
    monkeypatch.setattr(
        script,
        "load_dataset",
        lambda name, task, split: [{"question": f"{task} {i}?", "answer": f"{i}."} for i in range(sizes[task])],
    )
    script.main("tofu", tmp_path)
    rows = read_files([str(tmp_path / "train.jsonl")])
    assert [sum(row["task"] == task for row in rows) for task in sizes] == [36, 36]
    assert rows[0]["messages"][1:] == [
        {"role": "user", "content": "forget10 0?"},
        {"role": "assistant", "content": "0."},
    ]
    assert len((tmp_path / "validation.jsonl").read_text("utf-8").splitlines()) == 40


def test_documents_begin_with_what_a_model_reads(monkeypatch, tmp_path):
    script = import_module("examples.gpu.unlearning_data")
    texts = {"cyber-forget-corpus": ["a" * 5000, "b"], "cyber-retain-corpus": ["c"] * 5}
    monkeypatch.setattr(script, "load_dataset", lambda name, part, split: [{"text": text} for text in texts[part]])
    script.main("wmdp", tmp_path)
    rows = read_files([str(tmp_path / "train.jsonl")])
    assert [(row["task"], len(row["text"])) for row in rows] == [
        *[("forget", 4000), ("forget", 1)] * 2,
        *[("retain", 1)] * 5,
    ]


@pytest.mark.parametrize("name", ["tofu", "wmdp", "grpo"])
def test_a_plan_states_the_numbers_of_its_estimate(name, capsys):
    text = (GPU / f"{name}.yaml").read_text("utf-8")
    assert "NOT RUN YET" in text
    command = re.search(r"# +(hf-jd estimate .*?)\n# +Memory", text, re.DOTALL)
    assert command
    assert main(shlex.split(re.sub(r"\\\n#", "", command[1]))[1:]) == 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    memory = sum(gigabytes(printed[part]) for part in ("rows", "memory"))
    times = re.findall(r"([\d.]+) (m?s) (?:computing|rows)", printed["time"])
    seconds = sum(float(number) * {"s": 1, "ms": 1e-3}[unit] for number, unit in times)
    stated = re.search(r"by the last of these: (\d+) GB, and ([\d.]+) s per update", text)
    assert stated
    assert (float(stated[1]), float(stated[2])) == (round(memory), pytest.approx(seconds, rel=0.05))


def gigabytes(text: str) -> float:
    number, unit = text.split()[:2]
    return float(number) * {"GB": 1, "MB": 1e-3}[unit]

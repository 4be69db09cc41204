"""`benchmark.py gpu` in miniature: every case prints a line, whatever the machine has."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
NEEDS_CUDA = ["fp16 with GradScaler", "one process of NCCL", "4-bit base"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return import_module("benchmarks.gpu")


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text("utf-8").splitlines()]


def test_costs_and_parity_in_miniature(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "lines.jsonl"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of libraries about each other don't stop a run
        cases = ["LoRA, 1.5B, 8 x 1024", "parity", "upgrad", "fp16"]
        assert gpu.main(["--tiny", "--output", str(output), "--cases", *cases]) == 0
    cost, parity, upgrad, scaler = lines(output)
    for way in ("plain", "instance", "groups", "passes", "torchjd"):
        assert cost[way]["ms"] > 0
        assert cost[way]["ratio"] > 0
    assert parity["equal"]
    assert upgrad["m = 8"]["as chosen"]["ms"] > 0
    assert torch.cuda.is_available() or scaler["not_here"] == "needs CUDA"
    printed = capsys.readouterr().out
    for line in lines(output):
        assert line["case"] in printed
        assert line["device"]
        assert line["tiny"]


def test_a_run_continues_after_a_failure_and_ends_in_time(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(setting: Any) -> dict[str, Any]:
        raise RuntimeError("CUDA error\nand more")

    monkeypatch.setitem(gpu.CASES, "fails", fails)
    setting = gpu.Setting(torch.device("cpu"), True, float("inf"), 1)
    assert gpu.run("fails", setting)["error"] == "RuntimeError: CUDA error"
    late = gpu.Setting(torch.device("cpu"), True, 0.0, 1)
    assert gpu.run("fails", late)["not_here"] == "the time was up"


@pytest.mark.slow
def test_every_case_in_miniature(gpu: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "lines.jsonl"
    command = [sys.executable, "-W", "ignore", str(SCRIPTS / "benchmark.py"), "gpu", "--tiny", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SCRIPTS.parent)
    assert not done.returncode, done.stderr
    by_case = {line["case"]: line for line in lines(output)}
    assert list(by_case) == list(gpu.CASES)
    assert not [line for line in by_case.values() if "error" in line]
    if not torch.cuda.is_available():
        assert [case for case, line in by_case.items() if line.get("not_here") == "needs CUDA"] == NEEDS_CUDA
    assert by_case["torch.compile"]["gramian"] < 1e-5
    assert by_case["two processes of gloo on one device"]["difference"] < 1e-5
    assert by_case["mean is the stock Trainer, bf16"]["difference"] < 0.05

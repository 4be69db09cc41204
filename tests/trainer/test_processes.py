"""Two processes under accelerate's launcher give the result of one; `tests/distributed` tests without a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.processes import CONFIGURATIONS, train
from tests.trainer.runs import relative

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Return the folder in which two processes saved their results, each in its own files."""
    folder = tmp_path_factory.mktemp("two")
    # `--cpu --num_processes 2` starts one process only (accelerate 1.15); `--multi_gpu` starts two, here on the CPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", "--mixed_precision", "no", "--num_machines", "1", "--dynamo_backend", "no"]
    command += ["tests/trainer/processes.py", str(folder), "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_two_processes_equal_one(name, two_processes, tmp_path):
    one = train(tmp_path, 4, **CONFIGURATIONS[name])
    first, second = (torch.load(two_processes / f"{name}-{rank}.pt") for rank in (0, 1))
    assert torch.equal(first["parameters"], second["parameters"])
    assert relative(first["parameters"], one["parameters"]) < 1e-6
    assert len(first["history"]) == len(one["history"]) >= 10
    for ours, theirs in zip(first["history"], one["history"], strict=True):
        assert ours.keys() == theirs.keys()
        # Processes that weigh separately log separate metrics.
        for key in ("loss", "grad_norm") if "micro-batch" in name else ours:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), key


def test_updates_of_two_processes_have_each_groups_share(two_processes):
    first, second = (torch.load(two_processes / f"stratified-{rank}.pt") for rank in (0, 1))
    # An epoch has two updates of 12, so one of the 23 examples comes twice.
    for epoch in range(0, 10, 2):
        updates = [a + b for a, b in zip(first["updates"], second["updates"], strict=True)][epoch : epoch + 2]
        assert {i for update in updates for i in update} == set(range(23))
        for update in updates:
            assert len(update) == 12
            assert abs(sum(i in (2, 9) for i in update) - 12 * 2 / 23) < 1
    assert first["updates"][:2] != first["updates"][2:4]
    for found in (first, second):
        for step, resumed in found["resumed"].items():
            assert resumed == found["updates"][step:]

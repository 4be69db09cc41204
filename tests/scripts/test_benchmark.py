"""`scripts/benchmark.py`: the benchmarks that need TRL, in miniature."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL 1.16 asks for datasets 4.7")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")
def test_rewards_are_timed(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import_module("benchmarks.rewards").main(["--rewards", "2", "--rounds", "1", "--tokens", "4"])
    *_, line = capsys.readouterr().out.splitlines()
    rewards, *times = (cell.strip() for cell in line.strip("|").split("|"))
    assert rewards == "2"
    assert all(float(time.removesuffix(" s")) > 0 for time in times)

"""`hf-jd reward`: TRL's script of that name, with JDRewardTrainer."""

from __future__ import annotations

from collections.abc import Sequence

from hf_jd.commands.common import run
from hf_jd.trainer.trl.trainers import JDRewardConfig, JDRewardTrainer


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    return run("reward", argv, JDRewardTrainer, JDRewardConfig)

"""`hf-jd dpo`: TRL's script of that name, with JDDPOTrainer."""

from __future__ import annotations

from collections.abc import Sequence

from hf_jd.commands.common import run
from hf_jd.trainer.trl.trainers import JDDPOConfig, JDDPOTrainer


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    return run("dpo", argv, JDDPOTrainer, JDDPOConfig)

"""`hf-jd kto`: TRL's script of that name, with JDKTOTrainer."""

from __future__ import annotations

from collections.abc import Sequence

from hf_jd.commands.common import run
from hf_jd.trainer.trl.trainers import JDKTOConfig, JDKTOTrainer


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    return run("kto", argv, JDKTOTrainer, JDKTOConfig)

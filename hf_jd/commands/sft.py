"""`hf-jd sft`: TRL's script of that name, with JDSFTTrainer."""

from __future__ import annotations

from collections.abc import Sequence

from hf_jd.commands.common import run
from hf_jd.trainer.trl.sft import JDSFTConfig, JDSFTTrainer


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    return run("sft", argv, JDSFTTrainer, JDSFTConfig)

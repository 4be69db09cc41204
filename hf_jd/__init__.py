"""Jacobian descent for Hugging Face training."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_jd.arguments import JDArguments, JDSeq2SeqTrainingArguments, JDTrainingArguments
    from hf_jd.gramian import Engine, Jacobian
    from hf_jd.trainer import JDSeq2SeqTrainer, JDState, JDTrainer, JDTrainerMixin
    from hf_jd.trainer.embeddings import JDSentenceTransformerTrainer, JDSentenceTransformerTrainingArguments
    from hf_jd.trainer.trl.sft import JDSFTConfig, JDSFTTrainer
    from hf_jd.trainer.trl.trainers import (
        JDDPOConfig,
        JDDPOTrainer,
        JDGRPOConfig,
        JDGRPOTrainer,
        JDKTOConfig,
        JDKTOTrainer,
        JDRewardConfig,
        JDRewardTrainer,
        JDRLOOConfig,
        JDRLOOTrainer,
    )
    from hf_jd.weighting import WEIGHTINGS, build_weighting

_ROOMS = {
    "Engine": "gramian",
    "JDArguments": "arguments",
    "JDDPOConfig": "trainer.trl.trainers",
    "JDDPOTrainer": "trainer.trl.trainers",
    "JDGRPOConfig": "trainer.trl.trainers",
    "JDGRPOTrainer": "trainer.trl.trainers",
    "JDKTOConfig": "trainer.trl.trainers",
    "JDKTOTrainer": "trainer.trl.trainers",
    "JDRLOOConfig": "trainer.trl.trainers",
    "JDRLOOTrainer": "trainer.trl.trainers",
    "JDRewardConfig": "trainer.trl.trainers",
    "JDRewardTrainer": "trainer.trl.trainers",
    "JDSFTConfig": "trainer.trl.sft",
    "JDSFTTrainer": "trainer.trl.sft",
    "JDSentenceTransformerTrainer": "trainer.embeddings",
    "JDSentenceTransformerTrainingArguments": "trainer.embeddings",
    "JDSeq2SeqTrainer": "trainer",
    "JDSeq2SeqTrainingArguments": "arguments",
    "JDState": "trainer",
    "JDTrainer": "trainer",
    "JDTrainerMixin": "trainer",
    "JDTrainingArguments": "arguments",
    "Jacobian": "gramian",
    "WEIGHTINGS": "weighting",
    "build_weighting": "weighting",
}

__all__ = [
    "Engine",
    "JDArguments",
    "JDDPOConfig",
    "JDDPOTrainer",
    "JDGRPOConfig",
    "JDGRPOTrainer",
    "JDKTOConfig",
    "JDKTOTrainer",
    "JDRLOOConfig",
    "JDRLOOTrainer",
    "JDRewardConfig",
    "JDRewardTrainer",
    "JDSFTConfig",
    "JDSFTTrainer",
    "JDSentenceTransformerTrainer",
    "JDSentenceTransformerTrainingArguments",
    "JDSeq2SeqTrainer",
    "JDSeq2SeqTrainingArguments",
    "JDState",
    "JDTrainer",
    "JDTrainerMixin",
    "JDTrainingArguments",
    "Jacobian",
    "WEIGHTINGS",
    "build_weighting",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for, so that `import hf_jd` is quick."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"hf_jd.{_ROOMS[name]}"), name)

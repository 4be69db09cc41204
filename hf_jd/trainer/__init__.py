"""Jacobian descent inside Hugging Face's Trainer: the bridge between the engine, weightings, losses and metrics."""

from hf_jd.trainer.mixin import JDSeq2SeqTrainer, JDTrainer, JDTrainerMixin
from hf_jd.trainer.step.weighing import JDState

__all__ = ["JDSeq2SeqTrainer", "JDState", "JDTrainer", "JDTrainerMixin"]

"""One interface for the places where a Trainer runs: one process or DDP, FSDP2, DeepSpeed."""

from __future__ import annotations

from typing import Any

from hf_jd.trainer.backends.base import Backend
from hf_jd.trainer.backends.deepspeed import DeepSpeed
from hf_jd.trainer.backends.fsdp2 import FSDP2

__all__ = ["Backend", "backend_of"]


def backend_of(trainer: Any) -> Backend:
    """Return the backend of a Trainer, from its arguments and accelerate's environment."""
    if trainer.is_deepspeed_enabled:
        return DeepSpeed(trainer)
    return FSDP2(trainer) if trainer.is_fsdp_enabled else Backend(trainer)

"""Where a Trainer trains: one process or DDP, FSDP2, DeepSpeed; what each does in its own way, behind one interface."""

from __future__ import annotations

from typing import Any

from hf_jd.trainer.backends.base import Backend
from hf_jd.trainer.backends.deepspeed import DeepSpeed
from hf_jd.trainer.backends.fsdp2 import FSDP2

__all__ = ["Backend", "backend_of"]


def backend_of(trainer: Any) -> Backend:
    """The backend of a Trainer, as its arguments and accelerate's environment have it."""
    if trainer.is_deepspeed_enabled:
        return DeepSpeed(trainer)
    return FSDP2(trainer) if trainer.is_fsdp_enabled else Backend(trainer)

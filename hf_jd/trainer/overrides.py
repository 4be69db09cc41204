"""Which of Trainer's losses is the user's own?"""

from __future__ import annotations

from typing import Any

_OURS = ("transformers.trainer", "hf_jd.trainer.unreduced")
"""The modules whose `compute_loss` and `compute_losses` are nobody's own."""


def overridden(trainer: Any) -> str | None:
    """Which of `compute_losses` and `compute_loss` is the user's own, the nearer one; None: neither is.

    Be it a class's, an instance's or one that was put in the place of Trainer's. A step of the user's own, right of the
    mixin, has a loss of its own as well.
    """
    right = False
    for attributes in (vars(trainer), *(vars(cls) for cls in type(trainer).__mro__)):
        unreduced = attributes.get("compute_losses")
        if unreduced is not None and getattr(unreduced, "__module__", None) not in _OURS:
            return "compute_losses"
        loss = attributes.get("compute_loss")
        if loss is not None and (getattr(loss, "__module__", None) not in _OURS or hasattr(loss, "__wrapped__")):
            return "compute_loss"
        step = getattr(attributes.get("training_step"), "__module__", None)
        if right and step is not None and step not in _OURS:
            return "compute_loss"
        right = right or step == "hf_jd.trainer.mixin"
    return None

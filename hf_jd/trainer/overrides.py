"""Find out whether `compute_loss` or `compute_losses` is the user's own."""

from __future__ import annotations

from typing import Any

_OURS = ("transformers.trainer", "hf_jd.trainer.unreduced")
"""The modules whose `compute_loss` and `compute_losses` are not the user's."""


def overridden(trainer: Any) -> str | None:
    """Returns "compute_losses" or "compute_loss", whichever the user overrides nearer to the instance; None if neither.

    It may belong to a class or an instance, or replace Trainer's own. The user's own `training_step`, to the right of
    the mixin, counts as a `compute_loss`.
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

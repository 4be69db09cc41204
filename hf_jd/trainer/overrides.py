"""Find which of `compute_loss`, `compute_losses` and `training_step` the user overrides, and whether that works."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

_OURS = ("transformers.trainer", "hf_jd.trainer.splitting.unreduced")
"""The modules whose `compute_loss` and `compute_losses` are not the user's."""
_LIBRARIES = ("hf_jd", "transformers", "trl", "sentence_transformers")
"""The packages whose `training_step` is not the user's, and neither reads nor changes `.grad`."""


def overridden(trainer: Any) -> str | None:
    """Return "compute_losses" or "compute_loss", whichever the user overrides nearer to the instance; None if neither.

    It may belong to a class or an instance, or replace Trainer's own. The user's own `training_step`, to the right of
    the mixin, counts as a `compute_loss`.
    """
    right_of_mixin = False
    for attributes in (vars(trainer), *(vars(cls) for cls in type(trainer).__mro__)):
        unreduced = attributes.get("compute_losses")
        if unreduced is not None and getattr(unreduced, "__module__", None) not in _OURS:
            return "compute_losses"
        loss = attributes.get("compute_loss")
        if loss is not None and (getattr(loss, "__module__", None) not in _OURS or hasattr(loss, "__wrapped__")):
            return "compute_loss"
        step = getattr(attributes.get("training_step"), "__module__", None)
        if right_of_mixin and step is not None and step not in _OURS:
            return "compute_loss"
        right_of_mixin = right_of_mixin or step == "hf_jd.trainer.mixin"
    return None


def has_user_step(trainer: Any) -> bool:
    """Return whether a user's `training_step` runs inside the mixin's, so that its code may read `.grad`."""
    return any(right for _, right in _user_steps(trainer))


def warn_of_gradients(trainer: Any) -> None:
    """Warn if a user's `training_step` around the mixin's names `.grad`, which is only written once per update."""
    for cls, right in _user_steps(trainer):
        names = _names(getattr(vars(cls)["training_step"], "__code__", None))
        if not right and names & {"grad", "clip_grad_norm_", "clip_grad_value_"} and "autograd" not in names:
            logger.warning(
                f"{cls.__name__}.training_step uses `.grad`, but under JDTrainerMixin `.grad` is written after it, "
                "once per update: read or change it in a TrainerCallback's on_pre_optimizer_step instead."
            )


def _user_steps(trainer: Any) -> Iterator[tuple[type, bool]]:
    """Yield the classes with a `training_step` of the user's, and whether they are to the right of the mixin."""
    right = False
    for cls in type(trainer).__mro__:
        step = vars(cls).get("training_step")
        if getattr(step, "__module__", None) == "hf_jd.trainer.mixin":
            right = True
        elif step is not None and cls.__module__.partition(".")[0] not in _LIBRARIES:
            yield cls, right


def _names(code: CodeType | None) -> set[str]:
    """Return the names of the attributes and globals that a function, or one defined inside it, uses."""
    if code is None:
        return set()
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


@contextmanager
def steps_through(trainer: Any, ours: Callable[..., Any], count: Callable[[], int]) -> Generator[None]:
    """Refuse a user's `training_step` that hides the mixin's, instead of training without Jacobian descent.

    Args:
        trainer: The trainer.
        ours: The mixin's `training_step`.
        count: Returns the number of micro-batches of this update that the mixin's step has seen.

    Raises:
        ValueError: After the first step that didn't call the mixin's.
    """
    step, before = trainer.training_step, vars(trainer).get("training_step")
    if getattr(step, "__func__", None) is ours:
        yield
        return

    def checked(*args: Any, **kwargs: Any) -> Any:
        count_before = count()
        loss = step(*args, **kwargs)
        if count() == count_before:
            raise ValueError(
                f"The training_step of {type(trainer).__name__} doesn't call super().training_step, so it trains "
                "without Jacobian descent: call it, or define training_step in a Trainer to the right of "
                "JDTrainerMixin, `class Both(JDTrainerMixin, Mine)`."
            )
        return loss

    trainer.training_step = checked
    try:
        yield
    finally:
        del trainer.training_step
        if before is not None:
            trainer.training_step = before

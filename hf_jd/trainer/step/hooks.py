"""Hooks on parameters: refuse those that don't work on rows as they do on a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin

SCALES = (2.0**10, 2.0**-10)  # A clamp leaves small gradients unchanged; beside large ones, an added constant vanishes.


def check_hooks(trainer: JDTrainerMixin, parameters: Sequence[nn.Parameter]) -> None:
    """Check the hooks on parameters.

    A linear hook (a mask, a factor) commutes with the weighted sum of rows, so it is applied to each row.

    Args:
        trainer: Remembers the parameters whose hooks are linear.
        parameters: The trainable ones.

    Raises:
        ValueError: A hook isn't linear, or waits for `.grad` to be accumulated in a backward pass.
    """
    for p in parameters:
        if p._post_accumulate_grad_hooks:
            raise ValueError(
                f"{_name(trainer, p)} has a hook that runs when a backward pass has accumulated its gradient "
                "(register_post_accumulate_grad_hook), but `.grad` is only written after weighing, once per update: "
                "do the same in a TrainerCallback's on_pre_optimizer_step."
            )
        # The row of a whole batch is its gradient, as in Trainer.
        if p._backward_hooks and p not in trainer.jd_hooked and not trainer.jd_args.kind.of_batches:
            if not all(_adds_up(p, scale) for scale in SCALES):
                raise ValueError(
                    f"{_name(trainer, p)} has a hook (register_hook) that isn't linear, such as a clamp, so what it "
                    "makes of the rows isn't what it makes of their sum: do the same in a TrainerCallback's "
                    "on_pre_optimizer_step, or choose --jd_objectives batch."
                )
            trainer.jd_hooked.add(p)


def _name(trainer: JDTrainerMixin, parameter: nn.Parameter) -> str:
    assert trainer.model is not None
    return next(f"The parameter {name}" for name, p in trainer.model.named_parameters() if p is parameter)


def _adds_up(p: nn.Parameter, scale: float) -> bool:
    """Return whether the hooks' result on a sum of two gradients of this scale is the sum of their results."""
    draws = torch.Generator().manual_seed(0)
    x, y = (scale * torch.randn(p.shape, generator=draws).to(p) for _ in range(2))
    of_x, of_y, of_sum = (_hooked(p, gradient) for gradient in (x, y, x + y))
    rounding = 3e-2 if p.dtype.itemsize == 2 else 1e-4
    return bool((of_sum - of_x - of_y).norm() <= rounding * (of_x.norm() + of_y.norm()))


@torch.no_grad()
def _hooked(p: nn.Parameter, gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    for hook in (p._backward_hooks or {}).values():
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    return gradient.double()

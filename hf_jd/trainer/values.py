"""The loss of each instance, if the model's head is known: for logs, and for weightings that read losses.

Gradients never depend on these values.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import logging

from hf_jd.distributed.processes import process_count
from hf_jd.losses import bare
from hf_jd.trainer.shares import Values, sums_of

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin

logger = logging.get_logger(__name__)

_ROUNDING = 1e-5  # of a loss in float32


def needs_values(trainer: JDTrainerMixin) -> str | None:
    """Returns the flag that needs each objective's value, if there is one."""
    jd = trainer.jd_args
    flags = {
        "--jd_normalize loss": jd.jd_normalize == "loss",
        f"the weighting `{jd.jd_weighting}`": getattr(trainer.weighting, "reads", "gramian") != "gramian",
    }
    return next((flag for flag, is_set in flags.items() if is_set), None)


@torch.no_grad()
def known_values(
    trainer: JDTrainerMixin, outputs: Any, loss: Tensor, has_rest: bool, instances: int, documents: Tensor | None
) -> Values | None:
    """Computes the instances' losses like the model's head; None if it is unknown, or computes something else.

    Args:
        trainer: Has the model and the batch.
        outputs: The model's outputs, by name.
        loss: [] Trainer's loss.
        has_rest: Whether it has a part that belongs to no instance.
        instances: B.
        documents: [N, T] the document of each token, if rows are packed.
    """
    inputs = trainer.jd_inputs
    if not (trainer.jd_valued and trainer.knows_losses) or not isinstance(outputs, Mapping):
        return None
    losses, counted = trainer.read_losses(outputs, inputs)
    owner = torch.arange(len(losses), device=losses.device)
    if documents is not None:
        owner = documents[:, : losses.shape[1]] if losses.ndim > 1 else owner[:0]
    if len(owner) != len(losses) or (documents is None and len(losses) != instances):
        return None
    sums, counts = sums_of([losses], [counted], [owner.to(loss.device)], instances)
    _compare(trainer, outputs, sums, counts)
    scale = _scale(trainer, outputs, loss, sums, counts, has_rest)
    return Values(sums, counts, sums * scale) if trainer.jd_valued else None


def part_of_router(trainer: JDTrainerMixin, outputs: Any) -> Tensor | None:
    """Returns the router's share [] of the model's own loss; None if unknown."""
    coefficient = getattr(bare(trainer.accelerator.unwrap_model(trainer.model)), "router_aux_loss_coef", None)
    has_both = isinstance(outputs, Mapping) and all(isinstance(outputs.get(n), Tensor) for n in ("loss", "aux_loss"))
    if coefficient is None or not has_both:
        return None
    return coefficient * outputs["aux_loss"].detach().double() / outputs["loss"].detach().double()


def _scale(trainer: JDTrainerMixin, outputs: Any, loss: Tensor, sums: Tensor, counts: Tensor, has_rest: bool) -> Tensor:
    """Returns the factor [] of the instances' losses in Trainer's loss."""
    total = sums[sums.isfinite()].sum()
    router = part_of_router(trainer, outputs) if has_rest else torch.zeros_like(total)
    if router is None or not sums.isfinite().all() or not loss.isfinite() or not total.abs() > 0:
        return 1 / (counts.sum().clamp(min=1) * trainer.current_gradient_accumulation_steps).double()
    return 1 / _divisor(trainer, total / (loss.double() * (1 - router)), counts)


def _divisor(trainer: JDTrainerMixin, quotient: Tensor, counts: Tensor) -> Tensor:
    """Returns the number [] by which Trainer divides the sum of the losses, without a float32 loss's rounding."""
    numbers = [1.0, float(counts.sum()), *([] if trainer.jd_items is None else [float(trainer.jd_items)])]
    averaged = {1, getattr(trainer, "current_gradient_accumulation_steps", 1)}
    processes = {1, process_count()}
    likely = quotient.new_tensor([n * a * p for n, a, p in product(numbers, averaged, processes) if n])
    error, which = (quotient / likely - 1).abs().min(0)
    return torch.where(error < _ROUNDING, likely[which], quotient)


def _compare(trainer: JDTrainerMixin, outputs: Mapping[str, Any], sums: Tensor, counts: Tensor) -> None:
    """Treats the instances' losses as unknown from now on if their mean is not the model's own loss.

    Raises:
        ValueError: A flag needs them.
    """
    whole, total, count = outputs.get("loss"), sums.sum(), counts.sum()
    if trainer.jd_compared or "aux_loss" in outputs or trainer.label_smoother is not None:
        return
    if not isinstance(whole, Tensor) or whole.dim() or not (count and whole.isfinite() and total.isfinite()):
        return
    trainer.jd_compared = True
    items = trainer.jd_items
    means = [total / count, total, *([] if items is None else [total / torch.as_tensor(items).to(total)])]
    half = any(isinstance(value, Tensor) and value.dtype.itemsize == 2 for value in outputs.values())
    tolerance = 3e-2 if half or torch.is_autocast_enabled(whole.device.type) else 1e-3
    if any(torch.isclose(whole.double(), mean, rtol=tolerance, atol=1e-6) for mean in means):
        return
    trainer.jd_valued = False
    why = (
        f"The model's own loss is {whole.item():.6g}, but the mean of its tokens' or instances' losses, as computed "
        f"for models of its kind, is {means[0].item():.6g}. So the value of each objective is not known"
    )
    flag = needs_values(trainer)
    if flag is not None:
        raise ValueError(f"{why}, which {flag} needs: leave it out, or return unreduced losses from `compute_losses`.")
    logger.warning(f"{why}: training uses the model's own loss, and logs no `jd/loss/`.")

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
from hf_jd.trainer.splitting.shares import Values, sums_of

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin

logger = logging.get_logger(__name__)

_ROUNDING = 1e-5  # relative rounding error of a float32 loss


def needs_values(trainer: JDTrainerMixin) -> str | None:
    """Return the flag that needs each objective's value, if there is one."""
    jd = trainer.jd_args
    flags = {
        "--jd_normalize loss": jd.jd_normalize == "loss",
        f"the weighting `{jd.jd_weighting}`": getattr(trainer.weighting, "reads", "gramian") != "gramian",
    }
    return next((flag for flag, is_set in flags.items() if is_set), None)


def check_values_are_not_needed(trainer: JDTrainerMixin, what: str) -> None:
    """Raise a ValueError if a flag needs each objective's value; `what` is why there are none."""
    flag = needs_values(trainer)
    if flag is not None:
        raise ValueError(
            f"{flag} needs the value of each objective, but {what} one for the whole batch: leave it out, or override "
            "`compute_losses` and return unreduced losses."
        )


@torch.no_grad()
def known_losses(
    trainer: JDTrainerMixin, outputs: Any, examples: int | None, documents: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Read the instances' losses from the model's outputs; None if the head is unknown, or computes something else.

    Call it before the graph of the loss is freed: autograd's saved tensors spare computing the losses again.

    Args:
        trainer: Has the model and the batch.
        outputs: The model's outputs, by name.
        examples: B, if known.
        documents: [N, T] the document of each token, if rows are packed.

    Returns:
        The sums of the instances' losses [B, 1], float64, and the numbers of losses [B, 1].
    """
    if not (trainer.jd_valued and trainer.knows_losses) or not isinstance(outputs, Mapping):
        return None
    losses, counted = trainer.read_losses(outputs, trainer.jd_inputs)
    owner = torch.arange(len(losses), device=losses.device)
    instances = len(losses)
    if documents is not None:
        owner = documents[:, : losses.shape[1]] if losses.ndim > 1 else owner[:0]
        instances = int(documents.max()) + 1
    if len(owner) != len(losses) or (documents is None and examples not in (None, instances)):
        return None
    sums, counts = sums_of([(losses, counted, owner.to(losses.device), 0)], instances, 1)
    _compare(trainer, outputs, sums, counts)
    return (sums, counts) if trainer.jd_valued else None


def values_of(
    trainer: JDTrainerMixin, sums: Tensor, counts: Tensor, outputs: Any, loss: Tensor, has_rest: bool
) -> Values:
    """Turn the instances' losses into their parts of Trainer's loss [], which may have a rest."""
    total = sums[sums.isfinite()].sum()
    router = part_of_router(trainer, outputs) if has_rest else torch.zeros_like(total)
    if router is None or not sums.isfinite().all() or not loss.isfinite() or not total.abs() > 0:
        divisor = counts.sum().clamp(min=1) * trainer.current_gradient_accumulation_steps
    else:
        divisor = _divisor(trainer, total / (loss.double() * (1 - router)), counts)
    return Values(sums, counts, sums / divisor)


def part_of_router(trainer: JDTrainerMixin, outputs: Any) -> Tensor | None:
    """Return the router's share [] of the model's own loss; None if unknown."""
    coefficient = getattr(bare(trainer.model), "router_aux_loss_coef", None)
    has_both = isinstance(outputs, Mapping) and all(isinstance(outputs.get(n), Tensor) for n in ("loss", "aux_loss"))
    if coefficient is None or not has_both:
        return None
    return coefficient * outputs["aux_loss"].detach().double() / outputs["loss"].detach().double()


def _divisor(trainer: JDTrainerMixin, quotient: Tensor, counts: Tensor) -> Tensor:
    """Return the number [] by which Trainer divides the sum of the losses, without a float32 loss's rounding."""
    numbers = [1.0, float(counts.sum()), *([] if trainer.jd_items is None else [float(trainer.jd_items)])]
    averaged = {1, getattr(trainer, "current_gradient_accumulation_steps", 1)}
    processes = {1, process_count()}
    likely = quotient.new_tensor([n * a * p for n, a, p in product(numbers, averaged, processes) if n])
    error, which = (quotient / likely - 1).abs().min(0)
    return torch.where(error < _ROUNDING, likely[which], quotient)


def _compare(trainer: JDTrainerMixin, outputs: Mapping[str, Any], sums: Tensor, counts: Tensor) -> None:
    """Treat the instances' losses as unknown from now on if their mean is not the model's own loss.

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

"""Unreduced losses, from a user's `compute_losses` or from known heads, and the loss that they form."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_jd._compat import loss_is_scaled_for_ga
from hf_jd.arguments import JDArguments
from hf_jd.contradictions import listed
from hf_jd.distributed.processes import process_count
from hf_jd.gramian.sharding import layer_type
from hf_jd.losses import LOSSES, NAMED_LOSSES, bare, check_targets, known_kind
from hf_jd.trainer.overrides import overridden

logger = logging.get_logger(__name__)

Host = Trainer if TYPE_CHECKING else object

Losses = Tensor | tuple[Tensor, Tensor]
"""[], [B] or [B, T], optionally with a bool tensor that says which entries count."""

LOSS = "loss"
"""The name of a loss without a name."""


class Unreduced(NamedTuple):
    """The losses of a batch.

    Attributes:
        losses: By name, one loss for the batch [], or unreduced losses [B] or [B, T]; with a graph.
        counted: Which entries count (bool), in the same shapes.
        normalised: Whether Trainer's loss divides them by a number known in advance; otherwise each loss is divided by
            its count over the whole update.
    """

    losses: dict[str, Tensor]
    counted: dict[str, Tensor]
    normalised: bool


class LossesMixin(Host):
    """The part of `JDTrainerMixin` that computes losses.

    Attributes:
        jd_inputs: The current batch, as `compute_loss` gets it.
        jd_unreduced: Its unreduced losses, if `compute_losses` returned any.
        jd_extra: The part [] of its loss that belongs to none of these, if any.
    """

    jd_inputs: Any = None
    jd_unreduced: Unreduced | None = None
    jd_extra: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.jd_loss_func: Callable[..., Any] | None = self.compute_loss_func
        if self.jd_loss_func is not None:
            self.compute_loss_func = self._batch_loss

    @property
    def jd_args(self) -> JDArguments:
        """The current flags: a hyperparameter search changes them for each trial."""
        assert isinstance(self.args, JDArguments)
        return self.args

    def forget_losses(self) -> None:
        """Forget what is known about the model's losses, since the next run may have another model or flags."""
        self.jd_loss_names: list[str] = []
        self.jd_unreduced = self.jd_inputs = None
        # Whether the model's own loss consists of the instances' losses, as far as is known; see `values.py`.
        self.jd_valued, self.jd_compared = True, False
        self._jd_told_of_rest = False

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Losses | Mapping[str, Losses]:
        """Compute the unreduced losses of a batch: override this method to return your own.

        Args:
            model: Call it, not the model that it wraps.
            inputs: The batch.

        Returns:
            One loss per instance [B], or per token [B, T] with a bool tensor [B, T] that says which ones count. For
            several losses, a dict of these by name; with `--jd_objectives loss`, also the mean of a batch [].

        Raises:
            ValueError: There is no built-in loss for the model or for such a batch.
        """
        if self.jd_loss_func is not None:
            outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
            return self.jd_loss_func(outputs, inputs.get("labels"), num_items_in_batch=None)
        self._check_batch(inputs)
        outputs = model(**inputs)
        losses, counted = self.read_losses(outputs, inputs)
        core: Any = self.model
        coefficient, aux = getattr(bare(core), "router_aux_loss_coef", None), outputs.get("aux_loss")
        adapters = getattr(core, "peft_config", {}).values()
        if coefficient is not None and aux is not None:
            self.jd_extra = coefficient * aux
        elif any(getattr(adapter, "orth_reg_weight", 0) for adapter in adapters):  # AdaLoRA adds a penalty.
            self.jd_extra = outputs["loss"] - losses.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)
        return losses, counted

    def _check_batch(self, inputs: Any) -> None:
        """Raise a ValueError if a known head's losses can't be computed from the batch."""
        if not isinstance(inputs, Mapping):
            raise ValueError(
                f"The batch is a {type(inputs).__name__}, without names, so its labels are unknown: use a collator "
                "that returns a dict, or override `compute_losses`."
            )
        check_targets(self._built_in_kind(), inputs)

    def read_losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Losses:
        """Read the unreduced losses of a known head from the model's outputs; see `compute_losses`."""
        return LOSSES[self._built_in_kind()](outputs, inputs, bare(self.model), self._smoothing(inputs))

    @property
    def loss_kind(self) -> str | None:
        """The key of `LOSSES` for the model, with or without PEFT's wrappers; None if there is none."""
        core = bare(self.model)
        return known_kind(core, layer_type(core).__name__)

    def _built_in_kind(self) -> str:
        """Return the same, or raise a ValueError."""
        if self.loss_kind is None:
            raise ValueError(
                f"{type(bare(self.model)).__name__} has no built-in unreduced loss (there are: {', '.join(LOSSES)}): "
                "override `compute_losses` and return one loss per instance or per token."
            )
        return self.loss_kind

    @property
    def knows_losses(self) -> bool:
        """Whether Trainer's loss is a known head's, so that `read_losses` gives the instances' losses."""
        return self.loss_kind is not None and overridden(self) is None and self.jd_loss_func is None

    @property
    def tells_losses_apart(self) -> bool:
        """Whether the trainer itself separates the losses that its `compute_loss` adds up."""
        return False

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute Trainer's own loss, or, in training, the one from `compute_losses`."""
        self.jd_unreduced = self.jd_extra = None
        if return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.knows_losses:
            self._check_batch(inputs)
        if overridden(self) == "compute_losses":
            return self._reduced(self.compute_losses(model, inputs), num_items_in_batch)
        if not self.jd_args.kind.several or self.tells_losses_apart:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        named = self._named(outputs) if self.jd_loss_func is None else None
        return loss if named is None else self._reduced(named, num_items_in_batch)

    @contextmanager
    def unreduced_first(self) -> Generator[None]:
        """Use a user's `compute_losses` for the loss, even if there is a `compute_loss` for evaluation."""
        original = vars(self).get("compute_loss")
        if overridden(self) == "compute_losses":
            self.compute_loss = MethodType(LossesMixin.compute_loss, self)
        try:
            yield
        finally:
            vars(self).pop("compute_loss", None)
            if original is not None:
                self.compute_loss = original

    def _named(self, outputs: Any) -> Mapping[str, Losses] | None:
        """Return the losses by name of a model with several; None for other models."""
        named = outputs.get("losses") if isinstance(outputs, Mapping) else None
        if isinstance(named, Mapping):
            return named
        read = NAMED_LOSSES.get(self.loss_kind or "")
        return None if read is None or not self.knows_losses else read(outputs, self.jd_inputs)

    def _batch_loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """Return the single loss that Trainer expects from a `compute_loss_func`, also from unreduced losses."""
        assert self.jd_loss_func is not None
        losses = self.jd_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        if isinstance(losses, Tensor) and not losses.ndim:
            return losses
        # Trainer multiplies its loss by the number of processes if they share their token count.
        shared = self.args.average_tokens_across_devices and num_items_in_batch is not None
        return self._reduced(losses, num_items_in_batch) / (process_count() if shared else 1)

    def _reduced(self, losses: Losses | Mapping[str, Losses], num_items: Any) -> Tensor:
        """Reduce unreduced losses to the loss of a batch, and store them for the backward.

        A single loss of tokens is divided as in Trainer; others are means over the batch.
        """
        values, counted = by_name(losses)
        several, tokens = len(values) > 1, next(iter(values.values())).ndim > 1
        of_head = several and self.knows_losses
        # Does Trainer average the losses of an update's micro-batches, instead of adding them up?
        scaled = loss_is_scaled_for_ga(self)
        averaged = not (self.model_accepts_loss_kwargs or self.jd_loss_func) if scaled is None else not scaled
        # Losses of tokens are divided by their number in the update, if that is known.
        divisor_is_known = averaged or (tokens and not (num_items is None and scaled))
        normalised = of_head or (divisor_is_known and not several and not self.jd_args.own_mean)
        self.jd_unreduced = Unreduced(values, counted, normalised)
        by_items = tokens and not several and not averaged and num_items is not None
        divided_by_trainer = averaged or (scaled is None and num_items is None and self.jd_loss_func is None)
        batches = 1 if by_items or divided_by_trainer else self.current_gradient_accumulation_steps
        processes = process_count() if self.args.average_tokens_across_devices else 1
        parts = []
        for name, loss in values.items():
            finite = _finite(loss, counted[name])  # Leave out instances whose losses aren't finite.
            divide_by = torch.as_tensor(num_items) / processes if by_items else finite.sum().clamp(min=1) * batches
            parts.append(loss.masked_fill(~finite, 0).sum() / divide_by.to(loss.device))
        total = torch.stack(parts).sum()
        return total if self.jd_extra is None else total + self.jd_extra

    def _smoothing(self, inputs: Mapping[str, Any]) -> float:
        return self.args.label_smoothing_factor if "labels" in inputs else 0.0

    def name_of_rest(self, outputs: Any) -> str:
        """Return the name of the part of the loss that belongs to no instance."""
        return "aux_loss" if isinstance(outputs, Mapping) and "aux_loss" in outputs else "extra"

    def tell_of_rest(self) -> None:
        """Warn once that the loss has a part that belongs to no instance.

        Raises:
            ValueError: `--jd_extra_losses` is `error`.
        """
        warned, self._jd_told_of_rest = self._jd_told_of_rest, True
        if warned:
            return
        what = (
            "The loss has a part that belongs to no token, since it bypasses the model's outputs, such as a router's "
            "balancing loss or a penalty on parameters"
        )
        if self.jd_args.jd_extra_losses == "error":
            raise ValueError(
                f"{what}. Switch that off, add it to the mean with --jd_extra_losses mean, or make it one more "
                "objective with --jd_extra_losses objective."
            )
        logger.warning(f"{what}: it is added to the objectives' mean, and no weighting sees it.")

    def keep_loss_names(self, names: list[str], counted: bool) -> None:
        """Store the losses' names, which have to stay the same.

        Args:
            names: The names of a batch's losses.
            counted: Whether anything in the batch counts.

        Raises:
            ValueError: The names have changed, or there is only one loss where several are needed.
        """
        if self.jd_args.jd_objectives == "loss" and counted and len(names) < 2:
            raise ValueError(
                f"There is only one loss ({listed(names)}), but --jd_objectives loss weighs several: return a dict of "
                "losses by name from `compute_losses`, make a model's balancing loss one of them with "
                "--jd_extra_losses objective, or choose --jd_objectives instance."
            )
        if self.jd_loss_names and self.jd_loss_names != names:
            raise ValueError(
                f"The losses were {listed(self.jd_loss_names)}, but in another batch they are {listed(names)}: "
                "return the same names for each batch, and count nothing for a loss without a value."
            )
        self.jd_loss_names = names


def _finite(losses: Tensor, counted: Tensor) -> Tensor:
    """Return which losses count (bool), leaving out instances with a loss that isn't finite."""
    finite = losses.detach().isfinite() | ~counted
    return counted & (finite.flatten(1).all(1).view(-1, *[1] * (losses.ndim - 1)) if losses.ndim > 1 else finite)


def by_name(losses: Losses | Mapping[str, Losses]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the result of `compute_losses` into losses and masks of those that count; by default, all count.

    Raises:
        ValueError: It is neither losses, nor a dict of losses by name.
    """
    named = losses if isinstance(losses, Mapping) else {LOSS: losses}
    values, counted = {}, {}
    for name, loss in named.items():
        pair = loss if isinstance(loss, tuple) else (loss, None)
        values[name], mask = pair if len(pair) == 2 else (None, None)
        if not isinstance(values[name], Tensor) or not (mask is None or isinstance(mask, Tensor)):
            raise ValueError(
                f"The loss `{name}` is {type(loss).__name__}; give a tensor [], [B] or [B, T], or such a tensor with "
                "a bool tensor that says which entries count."
            )
        counted[name] = torch.ones_like(values[name], dtype=torch.bool) if mask is None else mask.bool()
        if counted[name].shape != values[name].shape:
            raise ValueError(
                f"The loss `{name}` has shape {list(values[name].shape)}, and its mask {list(counted[name].shape)}: "
                "give one bool per loss."
            )
    if not named:
        raise ValueError("compute_losses returned an empty dict: return one loss per name.")
    return values, counted

"""Unreduced losses, of a user's `compute_losses` or of heads that are known: what they are, and the loss they make."""

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
from hf_jd.distributed.processes import process_count
from hf_jd.losses import LOSSES, NAMED_LOSSES, bare, check_targets, known_kind, loss_kind
from hf_jd.trainer.overrides import overridden

logger = logging.get_logger(__name__)

Host = Trainer if TYPE_CHECKING else object

Losses = Tensor | tuple[Tensor, Tensor]
"""[], [B] or [B, T]; or with a bool tensor that says which of them count."""

LOSS = "loss"
"""The name of a loss that has no other one."""


class Unreduced(NamedTuple):
    """The losses of a batch.

    Attributes:
        losses: By name: one loss of the batch [], or unreduced ones [B] or [B, T]; with a graph.
        counted: Which of them count (bool), the same shapes.
        normalised: Whether Trainer's loss divides them by what it knows before; else each one is to be divided by the
            number of all that count in the update.
    """

    losses: dict[str, Tensor]
    counted: dict[str, Tensor]
    normalised: bool


class LossesMixin(Host):
    """What `JDTrainerMixin` knows of losses.

    Attributes:
        jd_inputs: The batch whose loss is computed, as `compute_loss` gets it.
        jd_unreduced: Its unreduced losses, if `compute_losses` gave some.
        jd_extra: [] the part of its loss that none of these owns, if there is one.
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
        """The flags as they are now: a hyperparameter search sets other ones for each trial."""
        assert isinstance(self.args, JDArguments)
        return self.args

    def forget_losses(self) -> None:
        """Forgets what was learnt of the model's losses: another run may have another model and other flags."""
        self.jd_loss_names: list[str] = []
        self.jd_unreduced = self.jd_inputs = None
        # Whether the losses of instances are what the model's own loss is made of, as far as is known; see `values.py`.
        self.jd_valued, self.jd_compared = True, False
        self._jd_told_of_rest = False

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Losses | Mapping[str, Losses]:
        """Computes the unreduced losses of a batch: the method to override for losses that are to be told apart.

        Args:
            model: Call it, not what it wraps.
            inputs: The batch.

        Returns:
            One loss for each instance [B], or for each token [B, T] with a bool tensor [B, T] that says which count.
            For several losses a dict of these by name; with `--jd_objectives loss`, also the mean of a batch [].

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
        """Raises a ValueError for a batch that the losses of a head that is known can't be computed from."""
        if not isinstance(inputs, Mapping):
            raise ValueError(
                f"The batch is a {type(inputs).__name__}, without names, so its labels can't be told: use a collator "
                "that returns a dict, or override `compute_losses`."
            )
        check_targets(loss_kind(self.model), inputs)

    def read_losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Losses:
        """Reads the unreduced losses of a head that is known from the model's outputs; see `compute_losses`."""
        core = self.model
        return LOSSES[loss_kind(core)](outputs, inputs, bare(core), self._smoothing(inputs))

    @property
    def knows_losses(self) -> bool:
        """Whether Trainer's loss is that of a head that is known, so that `read_losses` tells what instances lose."""
        known = known_kind(self.model) is not None
        return known and overridden(self) is None and self.jd_loss_func is None

    @property
    def tells_losses_apart(self) -> bool:
        """Whether the trainer itself tells the losses apart that its `compute_loss` adds up."""
        return False

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Trainer's own loss, or, in training, the one that `compute_losses` makes."""
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
        """Has a user's `compute_losses` make the loss, also beside a `compute_loss` that evaluates."""
        given = vars(self).get("compute_loss")
        if overridden(self) == "compute_losses":
            self.compute_loss = MethodType(LossesMixin.compute_loss, self)
        try:
            yield
        finally:
            vars(self).pop("compute_loss", None)
            if given is not None:
                self.compute_loss = given

    def _named(self, outputs: Any) -> Mapping[str, Losses] | None:
        """The losses by name of a model that returns several; None for another."""
        named = outputs.get("losses") if isinstance(outputs, Mapping) else None
        if isinstance(named, Mapping):
            return named
        read = NAMED_LOSSES.get(known_kind(self.model) or "")
        return None if read is None or not self.knows_losses else read(outputs, self.jd_inputs)

    def _batch_loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """What Trainer asks of a `compute_loss_func`: one loss, be it from a user's unreduced ones."""
        assert self.jd_loss_func is not None
        losses = self.jd_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        if isinstance(losses, Tensor) and not losses.ndim:
            return losses
        # Trainer multiplies its loss by the processes where these share their tokens' number.
        shared = self.args.average_tokens_across_devices and num_items_in_batch is not None
        return self._reduced(losses, num_items_in_batch) / (process_count() if shared else 1)

    def _reduced(self, losses: Losses | Mapping[str, Losses], num_items: Any) -> Tensor:
        """The loss of a batch from unreduced ones, which are kept for the backward.

        One loss of tokens is divided as Trainer has it; of others each is a mean over the batch.
        """
        values, counted = by_name(losses)
        several, tokens = len(values) > 1, next(iter(values.values())).ndim > 1
        said = loss_is_scaled_for_ga(self)
        # Whether Trainer averages the losses of micro-batches, instead of adding them up; and whether it divides.
        by_batch = not (self.model_accepts_loss_kwargs or self.jd_loss_func) if said is None else not said
        divides = (not by_batch and num_items is None and self.jd_loss_func is None) if said is None else not said
        known = several and self.knows_losses
        normalised = by_batch or (tokens and not (num_items is None and said))
        self.jd_unreduced = Unreduced(
            values, counted, known or (normalised and not several and not self.jd_args.own_mean)
        )
        # Those of instances that aren't finite are left out.
        finite = {name: _finite(losses, counted[name]) for name, losses in values.items()}
        if tokens and not several and not by_batch and num_items is not None:
            processes = process_count() if self.args.average_tokens_across_devices else 1
            divide_by = {name: torch.as_tensor(num_items) / processes for name in values}
        else:
            undivided = 1 if divides or by_batch else self.current_gradient_accumulation_steps
            divide_by = {name: finite[name].sum().clamp(min=1) * undivided for name in values}
        sums = {name: values[name].masked_fill(~finite[name], 0).sum() for name in values}
        total = torch.stack([sums[name] / divide_by[name].to(sums[name].device) for name in values]).sum()
        return total if self.jd_extra is None else total + self.jd_extra

    def _smoothing(self, inputs: Mapping[str, Any]) -> float:
        return self.args.label_smoothing_factor if "labels" in inputs else 0.0

    def name_of_rest(self, outputs: Any) -> str:
        """What the part of the loss that no instance owns is called."""
        return "aux_loss" if isinstance(outputs, Mapping) and "aux_loss" in outputs else "extra"

    def tell_of_rest(self) -> None:
        """Says once that the loss has a part that no instance owns.

        Raises:
            ValueError: `--jd_extra_losses` is `error`.
        """
        told, self._jd_told_of_rest = self._jd_told_of_rest, True
        if told:
            return
        what = (
            "The loss has a part that no token owns: it does not come through the model's outputs, as a router's "
            "balancing loss or a penalty on parameters"
        )
        if self.jd_args.jd_extra_losses == "error":
            raise ValueError(
                f"{what}. Switch that off, add it to the mean with --jd_extra_losses mean, or make it an objective of "
                "its own with --jd_extra_losses objective."
            )
        logger.warning(f"{what}: it is added to the objectives' mean, and no weighting sees it.")

    def keep_loss_names(self, names: list[str], counted: bool) -> None:
        """Keeps the losses' names, which have to stay the same.

        Args:
            names: Those of a batch's losses.
            counted: Whether anything counts in the batch.

        Raises:
            ValueError: Other ones came before, or there is one loss where several are to be weighed.
        """
        if self.jd_args.jd_objectives == "loss" and counted and len(names) < 2:
            raise ValueError(
                f"There is one loss only ({_quoted(names)}), and --jd_objectives loss weighs several: return a dict of "
                "them by name from `compute_losses`, make a model's balancing loss one of them with --jd_extra_losses "
                "objective, or choose --jd_objectives instance."
            )
        if self.jd_loss_names and self.jd_loss_names != names:
            raise ValueError(
                f"The losses were {_quoted(self.jd_loss_names)}, and in another batch they are {_quoted(names)}: "
                "return the same ones for each batch, with nothing counted where one has no value."
            )
        self.jd_loss_names = names


def _finite(losses: Tensor, counted: Tensor) -> Tensor:
    """Which losses count (bool), of instances all of whose losses are finite."""
    finite = losses.detach().isfinite() | ~counted
    return counted & (finite.flatten(1).all(1).view(-1, *[1] * (losses.ndim - 1)) if losses.ndim > 1 else finite)


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def by_name(losses: Losses | Mapping[str, Losses]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits what `compute_losses` returned into losses and what counts of them; without a mask, every loss counts.

    Raises:
        ValueError: It is neither losses, nor a dict of them by name.
    """
    named = losses if isinstance(losses, Mapping) else {LOSS: losses}
    values, counted = {}, {}
    for name, given in named.items():
        pair = given if isinstance(given, tuple) else (given, None)
        values[name], mask = pair if len(pair) == 2 else (None, None)
        if not isinstance(values[name], Tensor) or not (mask is None or isinstance(mask, Tensor)):
            raise ValueError(
                f"The loss `{name}` is {type(given).__name__}; give a tensor [], [B] or [B, T], or such a tensor with "
                "a bool tensor that says which of them count."
            )
        counted[name] = torch.ones_like(values[name], dtype=torch.bool) if mask is None else mask.bool()
        if counted[name].shape != values[name].shape:
            raise ValueError(
                f"The loss `{name}` has shape {list(values[name].shape)}, and what counts of it "
                f"{list(counted[name].shape)}: give a bool for each loss."
            )
    if not named:
        raise ValueError("compute_losses returned no loss at all: return one by each name.")
    return values, counted

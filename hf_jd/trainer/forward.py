"""The losses' side of the trainer: a batch -> unreduced losses, and what Trainer would divide them by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_jd._compat import loss_is_scaled_for_ga
from hf_jd.arguments import JDArguments
from hf_jd.batches import group_ids, without_groups
from hf_jd.distributed.processes import process_count
from hf_jd.gramian.random_streams import unchanged_streams
from hf_jd.losses import LOSSES, NAMED_LOSSES, bare, check_targets, is_summed, known_kind, loss_kind, model_inputs
from hf_jd.trainer.own_loss import OwnLoss, overridden

logger = logging.get_logger(__name__)

Host = Trainer if TYPE_CHECKING else object

Losses = Tensor | tuple[Tensor, Tensor]
"""[], [B] or [B, T]; or with a bool tensor that says which of them count."""

LOSS = "loss"
"""The name of a loss that has no other one."""


class Forward(NamedTuple):
    """What a batch's forward pass brought.

    Attributes:
        losses: By name: one loss of the batch [], or unreduced ones [B] or [B, T].
        counted: Which of them count (bool), the same shapes.
        groups: [B] the groups' ids, if there are groups.
        extra: [] the part of the model's loss that no token or instance owns, if it has one.
    """

    losses: dict[str, Tensor]
    counted: dict[str, Tensor]
    groups: Tensor | None
    extra: Tensor | None


class LossesMixin(Host):
    """What `JDTrainerMixin` knows of losses."""

    jd_loss_func: Callable[..., Any] | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.jd_loss_func = self.compute_loss_func
        if self.jd_loss_func is not None:
            self.compute_loss_func = self._batch_loss

    @property
    def jd_args(self) -> JDArguments:
        """The flags as they are now: a hyperparameter search sets other ones for each trial."""
        assert isinstance(self.args, JDArguments)
        return self.args

    def forget_losses(self) -> None:
        """Forgets what was learnt of the model's losses: another run may have another model and other flags."""
        # What the built-in losses leave over of the model's own loss in the last forward, if they do; None: not known.
        self._jd_extra_loss: Tensor | None = None
        self.jd_own_loss = OwnLoss()
        self.jd_loss_names: list[str] = []
        self._jd_summed = False
        self.jd_again = False
        # Whether the model's outputs have several losses by name; None: not known. And whether Trainer averages them.
        self._jd_brings_losses: bool | None = None
        self._jd_averaged = False
        # Whether Trainer's own loss is split, and whether a user's function has told; None: not known.
        self._jd_splits: bool | None = None
        self._jd_knows_func = False

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Losses | Mapping[str, Losses]:
        """Computes the unreduced losses of a batch: the one method to override for a loss of your own.

        Args:
            model: Call it, not what it wraps.
            inputs: The batch.

        Returns:
            One loss for each instance [B], or for each token [B, T] with a bool tensor [B, T] that says which count.
            For several losses a dict of these by name; with `--jd_objectives loss`, also the mean of a batch [].

        Raises:
            ValueError: There is no built-in loss for the model or for such a batch, or the model's own loss has a part
                that no token owns, and `--jd_extra_losses` is `error`.
        """
        _check_named(inputs)
        core = self.accelerator.unwrap_model(model)
        if self.jd_loss_func is not None:
            outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
            return self.read_losses(outputs, inputs, core)
        several = self.jd_args.kind.several
        outputs = None
        if several and self._jd_brings_losses is not False:
            outputs = model(**inputs)
            found = outputs.get("losses") if isinstance(outputs, Mapping) else None
            self._jd_brings_losses = isinstance(found, Mapping)
            if isinstance(found, Mapping):
                return found
        kind = loss_kind(core)
        check_targets(kind, inputs)
        # Trainer leaves the model's own loss alone where it smooths labels.
        compared = not self._smoothing(inputs)
        asks = outputs is not None or (compared and self.jd_own_loss.asks(core))
        if outputs is None:
            outputs = model(**(inputs if asks else model_inputs(kind, inputs, core)))
        if not isinstance(outputs, Mapping):
            raise ValueError(
                f"The model returned a {type(outputs).__name__}, without names, so its logits can't be told: set "
                "model.config.return_dict = True, or override `compute_losses`."
            )
        if compared:
            outputs = self.jd_own_loss.released(outputs)
        losses, counted = self.read_losses(outputs, inputs, core)
        self._jd_summed = is_summed(kind, core)
        if compared:
            asked = self.jd_args.jd_extra_losses
            self._jd_extra_loss = self.jd_own_loss.extra(losses, counted, outputs, core, asked, self._jd_summed)
        self._jd_averaged = several and kind in NAMED_LOSSES
        return NAMED_LOSSES[kind](outputs, inputs) if self._jd_averaged else (losses, counted)

    @property
    def splits_loss(self) -> bool:
        """Whether the loss of Trainer's own step is split at the model's outputs; else losses are unreduced."""
        if self._jd_splits is None:
            self._jd_splits = self._splits_loss()
        return self._jd_splits

    def _splits_loss(self) -> bool:
        kind, own = self.jd_args.kind, overridden(self)
        if kind.of_batches or kind.several or own is not None:
            return kind.of_batches or (own == "compute_loss" and not kind.several)
        return self.jd_loss_func is None and known_kind(self.accelerator.unwrap_model(self.model)) is None

    @property
    def has_own_loss(self) -> bool:
        """Whether `compute_loss` is the user's own."""
        return overridden(self) == "compute_loss"

    def learn_loss_func(self, model: nn.Module, batch: Any, num_items: Any) -> bool:
        """Finds out whether the user's `compute_loss_func` returns one loss, as Trainer has it, or unreduced ones.

        Args:
            model: As Trainer has wrapped it.
            batch: The first one.
            num_items: How many tokens Trainer counted in the update.

        Returns:
            Whether it was found out now, and it is one.
        """
        if self.jd_loss_func is None or self._jd_knows_func or self.jd_args.kind.several or overridden(self):
            return False
        self._jd_knows_func = True
        inputs = dict(self._prepare_inputs(without_groups(batch)))
        labels = inputs.pop("labels", None)
        with torch.no_grad(), unchanged_streams(self.args.device), self.compute_loss_context_manager():
            found = self.jd_loss_func(model(**inputs), labels, num_items_in_batch=num_items)
        self._jd_splits = isinstance(found, Tensor) and not found.ndim
        return self._jd_splits

    def read_losses(self, outputs: Any, inputs: Mapping[str, Any], core: nn.Module) -> Any:
        """What `compute_losses` reads from the outputs of the model `core`, as Trainer has got it."""
        if self.jd_loss_func is not None:
            return _checked(self.jd_loss_func(outputs, inputs.get("labels"), num_items_in_batch=None))
        return LOSSES[loss_kind(core)](outputs, inputs, bare(core), self._smoothing(inputs))

    def _smoothing(self, inputs: Mapping[str, Any]) -> float:
        return self.args.label_smoothing_factor if "labels" in inputs else 0.0

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean of the objectives in training; Trainer's own loss in evaluation, and where that is split."""
        if self.splits_loss or return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._jd_extra_loss = None
        losses, counted = by_name(self.compute_losses(model, without_groups(inputs)))
        divide_by = self.denominators(losses, counted, num_items_in_batch, 1)
        mean = process_count() * sum(
            values.masked_fill(~counted[name], 0).sum()
            / (counted[name].sum() if divide_by is None else divide_by[name])
            for name, values in losses.items()
        )
        return mean if self._jd_extra_loss is None else mean + self._jd_extra_loss

    def unreduced_losses(self, model: nn.Module, batch: Mapping[str, Any], again: bool = False) -> Forward:
        """Runs a batch forward; `again` where the update has met its examples before."""
        self._jd_extra_loss, self.jd_again = None, again
        groups, inputs = group_ids(batch), self._prepare_inputs(without_groups(batch))
        if isinstance(inputs, MutableMapping):
            inputs = copy(inputs)  # Whoever takes the labels out of it leaves the batch as it is.
        with self.compute_loss_context_manager():
            losses, counted = by_name(self.compute_losses(model, inputs))
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        groups = None if groups is None else groups.to(self.args.device)
        return Forward(losses, counted, groups, self._jd_extra_loss)

    def denominators(
        self, losses: Mapping[str, Tensor], counted: Mapping[str, Tensor], num_items: Any, micro_batches: int
    ) -> dict[str, Tensor] | None:
        """What Trainer divides a micro-batch's summed losses by, on this process; None: known when all are counted."""
        if self.jd_args.own_mean or (len(losses) > 1 and not self._jd_averaged):
            return None
        averaged = micro_batches * process_count()
        by_batch = not (self.model_accepts_loss_kwargs or self.jd_loss_func) or self._jd_averaged
        scaled = loss_is_scaled_for_ga(self)
        if scaled is not None:
            by_batch = not scaled
        if self._jd_summed:
            return {name: torch.full_like(values.sum(), averaged if by_batch else 1) for name, values in losses.items()}
        means = {name: found.sum().clamp(min=1) * averaged for name, found in counted.items()}
        if by_batch:
            return means  # Trainer averages the micro-batches, whatever their sizes.
        several = len(losses) > 1 or next(iter(losses.values())).ndim < 2
        if several or (num_items is None and scaled):
            return None
        if num_items is None:
            return means
        # The tokens of all processes, unless the user has each process average its own.
        processes = 1 if self.args.average_tokens_across_devices else process_count()
        return {name: torch.as_tensor(num_items * processes, device=found.device) for name, found in counted.items()}

    @property
    def has_extra(self) -> bool:
        """Whether the model's own loss has a part that no token or instance owns."""
        return bool(self.jd_own_loss.has_extra)

    def check_own_losses(self) -> None:
        """Raises a ValueError where the model's own loss was another one than ours; see `OwnLoss.check`."""
        self.jd_own_loss.check()

    def keep_loss_names(self, names: list[str], whole: bool, counted: bool) -> None:
        """Keeps the losses' names, which have to stay the same.

        Args:
            names: Those of a batch's losses.
            whole: Whether the part of the model's loss that no token owns is another one.
            counted: Whether anything counts in the batch.

        Raises:
            ValueError: Other ones came before, or there is one loss where several are to be weighed.
        """
        found = [*names, self.jd_own_loss.name] if whole else names
        if self.jd_args.jd_objectives == "loss" and counted and len(names) + (whole and self.has_extra) < 2:
            raise ValueError(
                f"There is one loss only ({_quoted(names)}), and --jd_objectives loss weighs several: return a dict of "
                "them by name from `compute_losses`, make a model's balancing loss one of them with --jd_extra_losses "
                "objective, or choose --jd_objectives instance."
            )
        if self.jd_loss_names and self.jd_loss_names != found:
            raise ValueError(
                f"The losses were {_quoted(self.jd_loss_names)}, and in another batch they are {_quoted(found)}: "
                "return the same ones for each batch, with nothing counted where one has no value."
            )
        self.jd_loss_names = found

    def _batch_loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """What Trainer asks of a `compute_loss_func`: one loss, be it from a user's unreduced ones."""
        assert self.jd_loss_func is not None
        found = self.jd_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        if isinstance(found, Tensor) and not found.ndim:
            return found
        losses, counted = by_name(_checked(found))
        number = num_items_in_batch if len(losses) == 1 else None
        means = [
            values.masked_fill(~counted[name], 0).sum() / (counted[name].sum() if number is None else number)
            for name, values in losses.items()
        ]
        return torch.stack(means).sum()


def _check_named(inputs: Any) -> None:
    if not isinstance(inputs, Mapping):
        raise ValueError(
            f"The batch is a {type(inputs).__name__}, without names, so its labels can't be told: use a collator that "
            "returns a dict, or override `compute_losses`."
        )


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _checked(losses: Any) -> Any:
    """The losses of a user's function, if they are unreduced or several."""
    first = losses[0] if isinstance(losses, tuple) else losses
    if not isinstance(losses, Mapping) and (not isinstance(first, Tensor) or first.ndim == 0):
        raise ValueError(
            "compute_loss_func returned one loss for the whole batch, and objectives need one for each instance [B], "
            "or for each token [B, T] with a bool tensor of those that count: leave out its last mean or sum."
        )
    return losses


def by_name(losses: Losses | Mapping[str, Losses]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits what `compute_losses` returned into losses and what counts of them; without a mask, every loss counts.

    Raises:
        ValueError: It is neither losses, nor a dict of them by name.
    """
    named = losses if isinstance(losses, Mapping) else {LOSS: losses}
    values, counted = {}, {}
    for name, found in named.items():
        pair = found if isinstance(found, tuple) else (found, None)
        values[name], mask = pair if len(pair) == 2 else (None, None)
        if not isinstance(values[name], Tensor) or not (mask is None or isinstance(mask, Tensor)):
            raise ValueError(
                f"The loss `{name}` is {type(found).__name__}; give a tensor [], [B] or [B, T], or such a tensor with "
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

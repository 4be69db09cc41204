"""`JDTrainer`: what happens in one step of Jacobian descent, inside Hugging Face's Trainer.

Trainer hands over all micro-batches of an update at once (`get_batch_samples`). They are kept until the last of them
reaches `training_step`; there all of them run: losses -> objectives -> rows -> Gramian -> weights -> `.grad`. Clipping,
optimizer, schedule, logging, evaluation and checkpoints remain Trainer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from accelerate.utils.memory import clear_device_cache

from hf_jd.arguments import JDArguments
from hf_jd.collator import GROUP_KEY, GroupCollator, group_names
from hf_jd.distributed import (
    AddedRows,
    GatheredRows,
    OwnRows,
    add_gradients,
    gather_uneven,
    process_count,
)
from hf_jd.gramian import Engine, Jacobian
from hf_jd.losses import LOSSES
from hf_jd.metrics import Averages, step_metrics
from hf_jd.objectives import OBJECTIVES, Objectives, Part
from hf_jd.weighting import Weighting

_Host = Trainer if TYPE_CHECKING else object


@dataclass(frozen=True)
class JDState:
    """The last step, for callbacks.

    Attributes:
        names: [m] the objectives' names: their groups', or those of instances by position, such as `3` or `3:code`.
        gramian: [m, m].
        weights: [m].
        losses: [m] the objectives' values, whose mean is Trainer's loss.
    """

    names: list[str]
    gramian: Tensor
    weights: Tensor
    losses: Tensor


class _Recorded(NamedTuple):
    """A micro-batch after its first pass: its part without a graph, its rows, and what a second pass needs."""

    batch: Mapping[str, Any]
    rng_state: list[Tensor]
    part: Part
    jacobian: Jacobian | None


class JDTrainerMixin(_Host):
    """Jacobian descent for any subclass of Trainer, to be placed left of it.

    Args:
        weighting: Any callable from a Gramian [m, m] to weights [m]; by default the one that `--jd_weighting` names.

    All other arguments are Trainer's; `args` has to hold the --jd_* flags (`JDTrainingArguments`).
    """

    def __init__(self, *args: Any, weighting: Callable[[Tensor], Tensor] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, JDArguments):
            raise ValueError(
                f"The arguments of {type(self).__name__} are {type(self.args).__name__}, without the --jd_* flags: use "
                "JDTrainingArguments."
            )
        self.jd_args: JDArguments = self.args
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func returns one loss for a whole batch, and objectives need one for each token or "
                "instance: override `compute_losses` instead."
            )
        jd = self.jd_args
        self.weighting = weighting or jd.build_weighting()
        self.jd_state: JDState | None = None
        self._jd_metrics = Averages()
        self._jd_batches: list[Mapping[str, Any]] = []
        self._jd_seen = 0
        self._jd_engine: tuple[nn.Module, Engine] | None = None
        self._jd_names: list[str] | None = None
        self._jd_loss_checked = not jd.jd_check
        if jd.jd_group_column is not None:
            if self.train_dataset is not None:
                self._jd_names = group_names(self.train_dataset, jd.jd_group_column)
            self._jd_names = jd.jd_groups or self._jd_names
            self.data_collator = GroupCollator(self.data_collator, jd.jd_group_column, self._jd_names)

    # ---- The user's side ----

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
        """Computes the unreduced losses of a batch: the one method to override for a loss of your own.

        Args:
            model: Call it, not what it wraps.
            inputs: The batch.

        Returns:
            One loss for each instance [B], or for each token [B, T] with a bool tensor [B, T] that says which count.

        Raises:
            ValueError: There is no built-in loss for the model, or its loss has a part that no token owns.
        """
        core = _core(self.accelerator.unwrap_model(model))
        kind = getattr(core, "loss_type", None)
        if kind is None and type(core).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            kind = "ForCausalLM"
        if kind not in LOSSES or core.config.is_encoder_decoder:
            raise ValueError(
                f"{type(core).__name__} has no built-in unreduced loss (there are: {', '.join(LOSSES)}): override "
                "`compute_losses` and return one loss for each instance or token."
            )
        if inputs.get("labels") is None:
            raise ValueError("The batch has no `labels`, so there are no losses: use a collator that makes them.")
        smoothing = self.args.label_smoothing_factor
        # The model's own loss would only cost time and memory; it is asked for once, as a reference.
        checked = self._jd_loss_checked or smoothing > 0
        labels = inputs["labels"]
        outputs = model(**({k: v for k, v in inputs.items() if k != "labels"} if checked else inputs))
        losses, counted = LOSSES[kind](outputs["logits"], labels, inputs.get("shift_labels"), smoothing)
        if not checked:
            _check_mean(losses, counted, outputs["loss"])
            self._jd_loss_checked = True
        return losses, counted

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean of the objectives in training; Trainer's own loss in evaluation."""
        if return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses, counted = _with_mask(self.compute_losses(model, _without_groups(inputs)))
        denominator = self._denominator(losses, counted, num_items_in_batch, 1)
        total = losses.masked_fill(~counted, 0).sum()
        return total.div(counted.sum() if denominator is None else denominator) * process_count()

    # ---- Trainer's side ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, after a look at what can't work; see Trainer."""
        self._check_setup()
        self._engine()  # Hooks must be there before anything compiles the model.
        return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Keeps the micro-batches of an update, for `training_step`; see Trainer."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._jd_batches = list(batches)
        self._jd_seen = 0
        return batches, num_items_in_batch

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Runs the whole update at its last micro-batch, and answers 0 until then.

        Returns:
            The part of this process in the objectives' mean, in the units of Trainer's loss.
        """
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # Schedule-free optimizers have two modes.
        if self.jd_args.jd_scope == "micro_batch":
            return self._update(model, [inputs], num_items_in_batch)
        self._jd_seen += 1
        if self._jd_seen < len(self._jd_batches):
            return torch.zeros((), device=self.args.device)
        batches, self._jd_batches = self._jd_batches, []
        return self._update(model, batches, num_items_in_batch)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Predicts, without the groups' ids; see Trainer."""
        return super().prediction_step(model, _without_groups(inputs), *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the metrics under `jd/` to the logs of training; see Trainer."""
        if "loss" in logs or "train_loss" in logs:
            logs.update(self._jd_metrics.take())
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        column = self.jd_args.jd_group_column
        if column is not None and column not in self._signature_columns:
            self._signature_columns.append(column)

    # ---- One update ----

    def _update(self, model: nn.Module, batches: list[Mapping[str, Any]], num_items: Any) -> Tensor:
        """Batches -> rows -> Gramian -> weights -> `.grad`; returns this process's part of the logged loss."""
        present = self._present_groups(batches)
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        recorded = [self._record(model, batch, num_items, len(batches), present, scale) for batch in batches]
        own, rows = self._joined(recorded)
        objectives = Objectives(rows.table(own), self._own_mean, recorded[0].part.denominator is not None)
        gramian = rows.gramian() / scale**2
        usable = objectives.usable(gramian)
        factors = objectives.factors(usable)
        weights = self._weigh(gramian, objectives, usable, factors)
        if scaler is not None and not usable[objectives.counts > 0].all():
            # An overflow has to stay in `.grad`: GradScaler then skips the step and lowers its scale.
            _accumulate({p: torch.full_like(p, torch.inf) for p in self._trainable()})
        elif self.jd_args.jd_backward == "one_pass":
            # GradScaler divides by its scale, which is in the rows.
            _accumulate(rows.weighted_sum(weights * factors, usable))
        else:
            self._second_pass(model, recorded, num_items, present, (weights * factors)[rows.mine], usable[rows.mine])
        mean = (factors / usable.sum().clamp(min=1))[rows.mine] * own[:, 0]
        return mean[usable[rows.mine]].sum().to(self.args.device) * process_count()

    def _record(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        num_items: Any,
        micro_batches: int,
        present: Tensor | None,
        scale: float,
    ) -> _Recorded:
        """Runs a micro-batch forward, and backward to its rows, which come multiplied by `scale`."""
        rng_state = _rng_state(self.args.device) if self.jd_args.jd_backward == "two_pass" else []
        with self.accelerator.no_sync(model):
            part = self._part(model, batch, num_items, micro_batches, present)
            jacobian = None
            if len(part.losses):
                jacobian = self._engine().compute_jacobian(part.losses * scale, part.segments)
        return _Recorded(batch, rng_state, replace(part, losses=part.losses.detach()), jacobian)

    def _part(
        self, model: nn.Module, batch: Mapping[str, Any], num_items: Any, micro_batches: int, present: Tensor | None
    ) -> Part:
        """Runs a micro-batch forward: its part in the objectives, with a graph."""
        inputs = dict(self._prepare_inputs(batch))  # ty: ignore[invalid-argument-type]
        groups = inputs.pop(GROUP_KEY, None)
        with self.compute_loss_context_manager():
            losses, counted = _with_mask(self.compute_losses(model, inputs))
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        if groups is None:
            groups = torch.full((len(losses),), -1, device=losses.device)
        denominator = self._denominator(losses, counted, num_items, micro_batches)
        split = OBJECTIVES[self.jd_args.jd_objectives].split
        return split(losses, counted, groups, groups if present is None else present, denominator)

    def _denominator(self, losses: Tensor, counted: Tensor, num_items: Any, micro_batches: int) -> Tensor | None:
        """What Trainer divides a micro-batch's summed losses by, on this process; None: known when all are counted."""
        if losses.ndim == 1 or self._own_mean:
            return None
        if not self.model_accepts_loss_kwargs or num_items is None:
            return counted.sum().clamp(min=1) * (micro_batches * process_count())
        # The tokens of all processes, unless the user has each process average its own.
        processes = 1 if self.args.average_tokens_across_devices else process_count()
        return torch.as_tensor(num_items * processes, device=losses.device)

    def _joined(self, recorded: list[_Recorded]) -> tuple[Tensor, OwnRows]:
        """The objectives of this process's micro-batches: their table [m, 4], and their rows."""
        tables = [r.part.table() for r in recorded]
        jacobians = [r.jacobian for r in recorded if r.jacobian is not None]
        jacobian = jacobians[0] if jacobians else None
        shared = OBJECTIVES[self.jd_args.jd_objectives].shared
        if shared:
            table = torch.cat([torch.stack(tables).sum(0)[:, :-1], tables[0][:, -1:]], dim=1)
            for other in jacobians[1:]:
                jacobian = jacobian + other
        else:
            table = torch.cat(tables)
            jacobian = Jacobian.cat(jacobians) if len(jacobians) > 1 else jacobian
        kind = OwnRows if self.jd_args.jd_scope == "micro_batch" else AddedRows if shared else GatheredRows
        return table, kind(jacobian, self._trainable())

    def _weigh(self, gramian: Tensor, objectives: Objectives, usable: Tensor, factors: Tensor) -> Tensor:
        """The weights [M] of the objectives, 0 for those that aren't usable; keeps the step's state and metrics."""
        weights = torch.zeros(len(usable), dtype=torch.float64, device=gramian.device)
        left_out = ((objectives.counts > 0) & ~usable).sum()
        self._jd_metrics.add({"jd/non_finite": left_out.double()})
        if not usable.any():
            return weights
        gramian = (factors.outer(factors).to(gramian) * gramian)[usable][:, usable]
        losses = (factors * objectives.table[:, 0])[usable]
        groups = objectives.groups[usable]
        by_group = self.jd_args.jd_objectives == "group"
        group_names = {k: self._group_name(k) for k in groups.unique().tolist() if k >= 0}
        names = [group_names[k] for k in groups.tolist()] if by_group else [str(i) for i in range(len(losses))]
        found = self._call_weighting(gramian, losses, names if by_group else None)
        weights[usable] = found
        self.jd_state = JDState(names, gramian, found, losses)
        means, counts = objectives.means[usable], objectives.counts[usable]
        self._jd_metrics.add(step_metrics(gramian, found, means, counts, groups, group_names))
        return weights

    def _call_weighting(self, gramian: Tensor, losses: Tensor, names: list[str] | None) -> Tensor:
        """W(G) [m], float64, from the weighting or any other callable."""
        m = len(losses)
        if m == 1:
            return torch.ones(1, dtype=torch.float64, device=gramian.device)
        if isinstance(self.weighting, Weighting):
            weights = self.weighting(losses if self.weighting.reads == "losses" else gramian, names=names)
        else:
            weights = self.weighting(gramian)
        if not isinstance(weights, Tensor) or weights.shape != (m,) or not weights.isfinite().all():
            raise ValueError(
                f"The weighting has to return {m} finite weights for a Gramian of shape [{m}, {m}]; it returned {weights}."
            )
        return weights.detach().to(device=gramian.device, dtype=torch.float64)

    def _second_pass(
        self,
        model: nn.Module,
        recorded: list[_Recorded],
        num_items: Any,
        present: Tensor | None,
        weights: Tensor,
        usable: Tensor,
    ) -> None:
        """Runs every micro-batch again, with the random numbers of its first pass, and descends sum_k w_k loss_k."""
        before = {p: p.grad for p in self._trainable()}
        for p in before:
            p.grad = None
        start = 0
        for batch, rng_state, first, _ in recorded:
            _set_rng_state(rng_state, self.args.device)
            with self.accelerator.no_sync(model):
                part = self._part(model, batch, num_items, len(recorded), present)
                shared = OBJECTIVES[self.jd_args.jd_objectives].shared
                mine = slice(None) if shared else slice(start, start + len(first.losses))
                start += len(first.losses)
                losses, ours = part.losses, usable[mine]
                if ours.any():
                    self.accelerator.backward((weights[mine][ours].to(losses) * losses[ours]).sum())
        gradients = {p: p.grad for p in before if p.grad is not None}
        for p, gradient in before.items():
            p.grad = gradient
        _accumulate(add_gradients(gradients, list(before)))

    # ---- What a step needs to know ----

    @property
    def _own_mean(self) -> bool:
        return self.jd_args.jd_objectives == "group" and self.jd_args.jd_group_reduction == "mean"

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _engine(self) -> Engine:
        """The engine on today's model: `model_init` may have made another one."""
        if self._jd_engine is None or self._jd_engine[0] is not self.model:
            if self._jd_engine is not None:
                self._jd_engine[1].detach()
            jd = self.jd_args
            self._jd_engine = self.model, Engine(self.model, keep_rows=jd.keep_rows(), check=jd.jd_check)
        return self._jd_engine[1]

    def _group_name(self, k: int) -> str:
        return str(k) if self._jd_names is None else self._jd_names[k]

    def _present_groups(self, batches: list[Mapping[str, Any]]) -> Tensor | None:
        """The sorted ids [K] of the groups that are weighed together; None without a group column."""
        column = self.jd_args.jd_group_column
        if column is None:
            return None
        for batch in batches:
            if GROUP_KEY not in batch:
                raise ValueError(
                    f"An example has no group column `{column}`; the batch has {', '.join(f'`{k}`' for k in batch)}."
                )
            if (batch[GROUP_KEY] < 0).any():
                raise ValueError(
                    f"An example has no value in the group column `{column}`, or one that is not in --jd_groups "
                    f"{' '.join(self._jd_names or [])}."
                )
        ids = torch.cat([batch[GROUP_KEY] for batch in batches]).to(self.args.device).unique()
        return ids if self.jd_args.jd_scope == "micro_batch" else gather_uneven(ids)[0].unique()

    def _check_setup(self) -> None:
        """Raises a ValueError for what can't be trained."""
        name = type(self).__name__
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{name} does not work under DataParallel ({self.args.n_gpu} GPUs in one process): start one process a "
                "GPU with `accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES=0."
            )
        if not self._trainable():
            raise ValueError("The model has no trainable parameter: add an adapter, or unfreeze some parameters.")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(f"{name} does not work with FSDP or DeepSpeed yet: use DDP, one process a GPU.")
        if max(self.get_tp_size(), self.get_cp_size(), self.get_sp_size()) > 1:
            raise ValueError(f"{name} does not work with tensor, context or sequence parallelism yet: use DDP.")
        if self.args.use_liger_kernel:
            raise ValueError("Liger's fused loss keeps no loss of each token: switch --use_liger_kernel off.")
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        if "lomo" in optimizer or "layerwise" in optimizer:
            raise ValueError(
                f"The optimizer `{optimizer}` steps inside the backward pass, before any weights are known: choose "
                "another one with --optim."
            )


class JDTrainer(JDTrainerMixin, Trainer):
    """`Trainer` with Jacobian descent; its `args` are `JDTrainingArguments`."""


class JDSeq2SeqTrainer(JDTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with Jacobian descent; its `args` are `JDSeq2SeqTrainingArguments`."""


def _core(model: nn.Module) -> Any:
    """The model inside PEFT's wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # ty: ignore[call-non-callable]


def _without_groups(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key != GROUP_KEY}


def _with_mask(losses: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Splits what `compute_losses` returned; without a mask, every loss counts."""
    return losses if isinstance(losses, tuple) else (losses, torch.ones_like(losses, dtype=torch.bool))


def _check_mean(losses: Tensor, counted: Tensor, mean: Tensor) -> None:
    """Raises a ValueError where the model's own loss has a part that no token owns."""
    ours = losses.detach().masked_fill(~counted, 0).sum() / counted.sum()
    if counted.any() and ours.isfinite() and not torch.isclose(ours, mean.detach().to(ours), rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"The model's own loss is {mean.item():.6g}, but the mean over its tokens is {ours.item():.6g}: it has a part "
            "that no token owns, such as a router's balancing loss. Switch that off, or override `compute_losses`."
        )


def _accumulate(gradients: dict[nn.Parameter, Tensor]) -> None:
    """Adds to `.grad`, where a stream that ended in mid-accumulation may have left something."""
    for p, gradient in gradients.items():
        p.grad = gradient if p.grad is None else p.grad + gradient


def _rng_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def _set_rng_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)

"""`JDTrainer`: what happens in one step of Jacobian descent, inside Hugging Face's Trainer.

Trainer hands over all micro-batches of an update at once (`get_batch_samples`). They are kept until the last of them
reaches `training_step`; there all of them run: losses -> objectives -> rows -> Gramian -> weights -> `.grad`. Clipping,
optimizer, schedule, logging, evaluation and checkpoints remain Trainer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from transformers import Seq2SeqTrainer, Trainer
from transformers.utils import logging

from hf_jd.arguments import JDArguments
from hf_jd.checkpoints import STATE_FILE, check_room, check_writable, newest_whole, what_is_missing
from hf_jd.collator import GROUP_KEY, GroupCollator, group_names
from hf_jd.distributed import process_count
from hf_jd.gramian import Engine
from hf_jd.losses import LOSSES, bare, check_targets, is_summed, loss_kind, model_inputs, rest
from hf_jd.metrics import Averages
from hf_jd.update import JDState, Update
from hf_jd.weighting import Stateful

WEIGHTING_FILE = "jd_weighting.pt"
"""What a weighting remembers of past steps, in each checkpoint."""

logger = logging.get_logger(__name__)

_Host = Trainer if TYPE_CHECKING else object


class Forward(NamedTuple):
    """What a batch's forward pass brought.

    Attributes:
        losses: [B] or [B, T], unreduced.
        counted: Which of them count (bool), the same shape.
        groups: [B] the groups' ids, if there are groups.
        extra: [] the part of the model's loss that no token or instance owns, if it has one.
    """

    losses: Tensor
    counted: Tensor
    groups: Tensor | None
    extra: Tensor | None


class JDTrainerMixin(_Host):
    """Jacobian descent for any subclass of Trainer, to be placed left of it.

    Args:
        weighting: Any callable from a Gramian [m, m] to weights [m]; by default the one that `--jd_weighting` names.

    All other arguments are Trainer's; `args` has to hold the --jd_* flags (`JDTrainingArguments`).
    """

    def __init__(self, *args: Any, weighting: Callable[[Tensor], Tensor] | None = None, **kwargs: Any):
        arguments = kwargs.get("args", args[1] if len(args) > 1 else None)
        if getattr(arguments, "should_save", False) and arguments.output_dir is not None:
            check_writable(Path(arguments.output_dir))  # Trainer would answer with a traceback.
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, JDArguments):
            raise ValueError(
                f"The arguments of {type(self).__name__} are {type(self.args).__name__}, without the --jd_* flags: use "
                "JDTrainingArguments."
            )
        self.jd_args: JDArguments = self.args
        self.jd_loss_func = self.compute_loss_func
        if self.jd_loss_func is not None:
            self.compute_loss_func = self._batch_loss
        jd = self.jd_args
        self.weighting = weighting or jd.build_weighting()
        self.jd_state: JDState | None = None
        self.jd_metrics = Averages()
        self._jd_batches: list[Mapping[str, Any]] = []
        self._jd_seen = 0
        self._jd_engine: tuple[nn.Module, Engine] | None = None
        self.jd_group_names: list[str] | None = None
        # What the built-in losses leave over of the model's own loss in the last forward, if they do; None: not known.
        self._jd_extra_loss: Tensor | None = None
        self._jd_has_extra: bool | None = None
        self._jd_summed = False
        self._jd_broken_in_a_row = 0
        if jd.jd_group_column is not None:
            if self.train_dataset is not None:
                self.jd_group_names = group_names(self.train_dataset, jd.jd_group_column, jd.jd_groups)
            self.data_collator = GroupCollator(self.data_collator, jd.jd_group_column, self.jd_group_names)

    # ---- The user's side ----

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
        """Computes the unreduced losses of a batch: the one method to override for a loss of your own.

        Args:
            model: Call it, not what it wraps.
            inputs: The batch.

        Returns:
            One loss for each instance [B], or for each token [B, T] with a bool tensor [B, T] that says which count.

        Raises:
            ValueError: There is no built-in loss for the model or for such a batch, or the model's own loss has a part
                that no token owns, and `--jd_extra_losses` is `error`.
        """
        if self.jd_loss_func is not None:
            outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
            return _checked(self.jd_loss_func(outputs, inputs.get("labels"), num_items_in_batch=None))
        core = self.accelerator.unwrap_model(model)
        kind = loss_kind(core)
        check_targets(kind, inputs)
        smoothing = self.args.label_smoothing_factor if "labels" in inputs else 0.0
        # The model's own loss is asked for once, as a reference, and where it has a part that only it knows.
        whole = not smoothing and self._jd_has_extra is not False
        outputs = model(**(inputs if whole else model_inputs(kind, inputs, core)))
        losses, counted = LOSSES[kind](outputs, inputs, bare(core), smoothing)
        self._jd_summed = is_summed(kind, core)
        if whole:
            self._keep_extra(losses, counted, outputs)
        return losses, counted

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean of the objectives in training; Trainer's own loss in evaluation."""
        if return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._jd_extra_loss = None
        losses, counted = _with_mask(self.compute_losses(model, _without_groups(inputs)))
        denominator = self.denominator(losses, counted, num_items_in_batch, 1)
        total = losses.masked_fill(~counted, 0).sum()
        mean = total.div(counted.sum() if denominator is None else denominator) * process_count()
        return mean if self._jd_extra_loss is None else mean + self._jd_extra_loss

    # ---- Trainer's side ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains, after a look at what can't work; see Trainer.

        Args:
            resume_from_checkpoint: True takes the newest checkpoint that is whole, and says which it skipped.
            args: Trainer's.
            kwargs: Trainer's.

        Raises:
            ValueError: The run can't work, or too many updates in a row weren't finite.
        """
        self._check_setup()
        self._jd_broken_in_a_row = 0
        if resume_from_checkpoint:
            resume_from_checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        if isinstance(self.weighting, Stateful):
            self.weighting.reset()
        if self.args.torch_compile:
            # The engine walks a graph, and keeps it for another walk: its buffers must not be given away.
            functorch_config.donated_buffer = False  # ty: ignore[invalid-assignment]
        self.engine()  # Hooks must be there before anything compiles the model.
        return super().train(resume_from_checkpoint, *args, **kwargs)

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
        to_train_mode = getattr(self.optimizer, "train", None)
        if callable(to_train_mode):
            to_train_mode()  # Schedule-free optimizers have two modes.
        if self.jd_args.jd_scope == "micro_batch":
            return Update(self, model, [inputs], num_items_in_batch).run()
        self._jd_seen += 1
        if self._jd_seen < len(self._jd_batches):
            return torch.zeros((), device=self.args.device)
        batches, self._jd_batches = self._jd_batches or [inputs], []
        return Update(self, model, batches, num_items_in_batch).run()

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Predicts, without the groups' ids; see Trainer."""
        return super().prediction_step(model, _without_groups(inputs), *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the metrics under `jd/` to the logs of training; see Trainer."""
        if "loss" in logs or "train_loss" in logs:
            logs.update(self.jd_metrics.take())
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A checkpoint that is written over another one is not whole until it is finished.
        run = Path(self._get_output_dir(trial=trial))
        if self.args.should_save:
            (run / f"checkpoint-{self.state.global_step}" / STATE_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if isinstance(self.weighting, Stateful) and self.args.should_save:
            torch.save(self.weighting.state_dict(), Path(output_dir) / WEIGHTING_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        file = None if checkpoint is None else Path(checkpoint) / WEIGHTING_FILE
        if isinstance(self.weighting, Stateful) and file is not None and file.is_file():
            self.weighting.load_state_dict(torch.load(file))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        column = self.jd_args.jd_group_column
        assert self._signature_columns is not None
        if column is not None and column not in self._signature_columns:
            self._signature_columns.append(column)

    # ---- What an update needs ----

    def unreduced_losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Forward:
        """Runs a batch forward."""
        self._jd_extra_loss = None
        inputs = dict(self._prepare_inputs(batch))  # ty: ignore[invalid-argument-type]
        groups = inputs.pop(GROUP_KEY, None)
        with self.compute_loss_context_manager():
            losses, counted = _with_mask(self.compute_losses(model, inputs))
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return Forward(losses, counted, groups, self._jd_extra_loss)

    def denominator(self, losses: Tensor, counted: Tensor, num_items: Any, micro_batches: int) -> Tensor | None:
        """What Trainer divides a micro-batch's summed losses by, on this process; None: known when all are counted."""
        if self.jd_args.own_mean:
            return None
        one = torch.ones((), device=losses.device)
        if not (self.model_accepts_loss_kwargs or self.jd_loss_func):
            # Trainer averages the micro-batches, whatever their sizes.
            return (one if self._jd_summed else counted.sum().clamp(min=1)) * (micro_batches * process_count())
        if self._jd_summed:
            return one
        if losses.ndim == 1:
            return None
        if num_items is None:
            return counted.sum().clamp(min=1) * (micro_batches * process_count())
        # The tokens of all processes, unless the user has each process average its own.
        processes = 1 if self.args.average_tokens_across_devices else process_count()
        return torch.as_tensor(num_items * processes, device=losses.device)

    @property
    def has_extra(self) -> bool:
        """Whether the model's own loss has a part that no token or instance owns."""
        return bool(self._jd_has_extra)

    def trainable(self) -> list[nn.Parameter]:
        """The trainable parameters, in the same order on all processes."""
        assert self.model is not None
        return [p for p in self.model.parameters() if p.requires_grad]

    def engine(self) -> Engine:
        """The engine on today's model: `model_init` may have made another one."""
        assert self.model is not None
        if self._jd_engine is None or self._jd_engine[0] is not self.model:
            if self._jd_engine is not None:
                self._jd_engine[1].detach()
            self._jd_engine = (self.model, Engine(self.model, check=self.jd_args.jd_check))
        return self._jd_engine[1]

    def group_name(self, k: int) -> str:
        """The name of the group with the id k."""
        return str(k) if self.jd_group_names is None else self.jd_group_names[k]

    def _keep_extra(self, losses: Tensor, counted: Tensor, outputs: Any) -> None:
        """Finds out whether the model's own loss has a part that no token owns, and keeps that part."""
        if not counted.any():
            return
        left, found = rest(losses, counted, outputs["loss"], self._jd_summed)
        if self._jd_has_extra is None and losses.detach()[counted].isfinite().all():
            self._jd_has_extra = found or outputs.get("aux_loss") is not None
            if self._jd_has_extra:
                own = f"The model's own loss is {outputs['loss'].item():.6g}, {left.item():.3g} of it not its tokens'"
                if self.jd_args.jd_extra_losses == "error":
                    raise ValueError(
                        f"{own}: it has a part that no token owns, such as a router's balancing loss. Switch that off, "
                        "override `compute_losses`, or add it to the mean with --jd_extra_losses mean."
                    )
                logger.warning(f"{own}: that part is added to the mean of the objectives, and no weighting sees it.")
        if self._jd_has_extra:
            self._jd_extra_loss = left

    def _batch_loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """What Trainer asks of a `compute_loss_func`, in evaluation: one loss, from the user's unreduced ones."""
        assert self.jd_loss_func is not None
        losses, counted = _with_mask(_checked(self.jd_loss_func(outputs, labels, num_items_in_batch=None)))
        total = losses.masked_fill(~counted, 0).sum()
        return total / (counted.sum() if num_items_in_batch is None else num_items_in_batch)

    def count_broken(self, broken: bool) -> None:
        """Counts the updates in a row in which something wasn't finite, and stops after `--jd_max_non_finite`."""
        self._jd_broken_in_a_row = self._jd_broken_in_a_row + 1 if broken else 0
        if self._jd_broken_in_a_row >= self.jd_args.jd_max_non_finite:
            raise ValueError(
                f"{self._jd_broken_in_a_row} updates in a row had losses or gradients that aren't finite, the last one "
                f"being {self.state.global_step + 1}; the parameters are finite still. Lower the learning rate, look "
                "at the data that the log names, or allow more with --jd_max_non_finite."
            )

    def _checkpoint_to_resume(self, asked: str | bool) -> str | bool | None:
        """The checkpoint that is asked for, or the newest whole one of the output directory."""
        needed = []
        if not self.args.save_only_model:
            processes = range(self.args.world_size)
            states = ["rng_state.pth"] if len(processes) == 1 else [f"rng_state_{i}.pth" for i in processes]
            needed = ["optimizer.pt", "scheduler.pt", *states]
            needed += [WEIGHTING_FILE] if isinstance(self.weighting, Stateful) else []
        if not isinstance(asked, bool):
            missing = what_is_missing(Path(asked), needed) if Path(asked).is_dir() else "there is no such directory"
            if missing is not None:
                logger.warning(f"The checkpoint `{asked}` can't be resumed as it was: {missing}.")
            return asked
        assert self.args.output_dir is not None
        found, skipped = newest_whole(Path(self.args.output_dir), needed)
        for name, missing in skipped.items():
            logger.warning(f"Skipping {name}, which was not written to its end: {missing}.")
        if found is None and skipped:
            logger.warning("No checkpoint is whole: training starts at the beginning.")
            return None
        return True if found is None else str(found)

    def _check_setup(self) -> None:
        """Raises a ValueError for what can't be trained."""
        name = type(self).__name__
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{name} does not work under DataParallel ({self.args.n_gpu} GPUs in one process): start one process a "
                "GPU with `accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES=0."
            )
        if not self.trainable():
            raise ValueError("The model has no trainable parameter: add an adapter, or unfreeze some parameters.")
        unknown = set(self.jd_args.jd_ascend or []) - set(self.jd_group_names or self.jd_args.jd_ascend or [])
        if unknown:
            raise ValueError(
                f"--jd_ascend names {', '.join(f'`{n}`' for n in sorted(unknown))}, which is no group of the training "
                f"set; its groups are {', '.join(f'`{n}`' for n in self.jd_group_names or [])}."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(f"{name} does not work with FSDP or DeepSpeed yet: use DDP, one process a GPU.")
        if max(self.get_tp_size(), self.get_cp_size(), self.get_sp_size()) > 1:
            raise ValueError(f"{name} does not work with tensor, context or sequence parallelism yet: use DDP.")
        if self.args.use_liger_kernel:
            raise ValueError("Liger's fused loss keeps no loss of each token: switch --use_liger_kernel off.")
        if self.args.should_save and self.args.save_strategy != "no" and self.args.output_dir is not None:
            check_writable(Path(self.args.output_dir))
            assert self.model is not None
            check_room(Path(self.args.output_dir), self.model, hasattr(self.model, "peft_config"))
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


def _checked(losses: Any) -> Any:
    """The losses of a user's function, if they are unreduced."""
    first = losses[0] if isinstance(losses, tuple) else losses
    if not isinstance(first, Tensor) or first.ndim == 0:
        raise ValueError(
            "compute_loss_func returned one loss for the whole batch, and objectives need one for each instance [B], "
            "or for each token [B, T] with a bool tensor of those that count: leave out its last mean or sum."
        )
    return losses


def _without_groups(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key != GROUP_KEY}


def _with_mask(losses: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Splits what `compute_losses` returned; without a mask, every loss counts."""
    return losses if isinstance(losses, tuple) else (losses, torch.ones_like(losses, dtype=torch.bool))

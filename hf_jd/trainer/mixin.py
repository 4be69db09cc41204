"""`JDTrainerMixin`: the methods of Trainer that Jacobian descent replaces.

Trainer's own step runs for each micro-batch, except for its `accelerator.backward`, which records rows instead; at the
last micro-batch of an update, they are weighed and become `.grad`. Clipping, optimizer, schedule, logging, evaluation
and checkpoints remain Trainer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

from hf_jd.batches import group_ids
from hf_jd.checkpoints import STATE_FILE, check_writable
from hf_jd.collator import ExampleCounter
from hf_jd.distributed.agreement import check_alike
from hf_jd.gramian import Engine
from hf_jd.gramian.random_streams import RandomState, random_state
from hf_jd.metrics import Averages, pairs, readable
from hf_jd.trainer.backends import Backend, backend_of
from hf_jd.trainer.overrides import steps_through
from hf_jd.trainer.run.compiling import CompiledParts
from hf_jd.trainer.run.evaluating import EvaluationMixin
from hf_jd.trainer.run.peers import check_given, check_same_weights, lost_peers
from hf_jd.trainer.run.resuming import checkpoint_to_resume, load_weighting, needed_files, save_weighting
from hf_jd.trainer.run.run_log import RunLog
from hf_jd.trainer.run.sampling import stratified_sampler
from hf_jd.trainer.run.setup import FromFlags, check_liger, check_setup, follow_flags
from hf_jd.trainer.splitting.cotangents import OutputObserver
from hf_jd.trainer.step.backward import Recorder
from hf_jd.trainer.step.update import Update
from hf_jd.trainer.step.weighing import JDState


class JDTrainerMixin(EvaluationMixin):
    """Jacobian descent for any subclass of Trainer; put it to the left of that class.

    Args:
        weighting: Any callable from a Gramian [m, m] to weights [m]; by default, the one in `--jd_weighting`.
        engine_options: Further arguments of `hf_jd.gramian.Engine`, such as `rules`.

    All other arguments are Trainer's; `args` has to have the --jd_* flags (`JDTrainingArguments`).
    """

    jd_backward: Callable[[Tensor], None] | None = None
    jd_retain_graph = False  # whether another loss will be computed from the same outputs
    jd_groups_of_batch: Tensor | None = None  # if they are unknown until `compute_loss`

    def __init_subclass__(cls, **kwargs: Any):
        """Refuse a class with a Trainer to the left of the mixin, whose methods would run instead of the mixin's."""
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(JDTrainerMixin):
            left = next(base.__name__ for base in cls.__bases__ if issubclass(base, Trainer))
            raise TypeError(
                f"{cls.__name__} names {left} before JDTrainerMixin, so its plain steps would run: put the mixin to "
                f"the left, `class {cls.__name__}(JDTrainerMixin, {left})`."
            )

    def __init__(
        self,
        *args: Any,
        weighting: Callable[[Tensor], Tensor] | None = None,
        engine_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        arguments = kwargs.get("args", args[1] if len(args) > 1 else None)
        if getattr(arguments, "should_save", False) and arguments.output_dir is not None:
            check_writable(Path(arguments.output_dir))  # before Trainer fails with a traceback
        super().__init__(*args, **kwargs)
        self.weighting: Any = weighting
        self._jd_from_flags = FromFlags()
        self.jd_model_takes_groups = False
        self.jd_group_names: list[str] | None = None
        self._jd_engine: tuple[nn.Module, Engine] | None = None
        self._jd_compiled: CompiledParts | None = None
        self.jd_engine_options = dict(engine_options or {})
        self.jd_outputs = OutputObserver([])
        self.jd_log = RunLog()
        self.follow_flags()
        self._forget()

    # ---- Trainer's side ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Check the set-up, and train; see Trainer.

        Args:
            resume_from_checkpoint: True or `last` uses the newest complete checkpoint, and says which ones it skipped.
            args: Trainer's.
            kwargs: Trainer's.

        Raises:
            ValueError: The run can't work, or too many updates in a row weren't finite.
        """
        check_liger(self)
        if resume_from_checkpoint:
            check_alike({"resume_from_checkpoint": resume_from_checkpoint})  # before only some processes raise an error
            resume_from_checkpoint = checkpoint_to_resume(self, resume_from_checkpoint, needed_files(self))
        try:
            with lost_peers(self):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._leave_model()
            self.is_in_train = False  # Trainer doesn't reset it after an error

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # By now, Trainer has built the model and set the flags of a search's trial, but has compiled nothing.
        self._begin(kwargs.get("resume_from_checkpoint"))
        with steps_through(self, JDTrainerMixin.training_step, lambda: self._jd_seen):
            return super()._inner_training_loop(*args, **kwargs)

    def _begin(self, checkpoint: str | None) -> None:
        """Begin a run with the current flags, and without any state of the previous run."""
        self._leave_model()
        self.follow_flags()
        self._forget()
        reset = getattr(self.weighting, "reset", None)
        if callable(reset):
            reset()
        check_setup(self)
        self.jd_log.begin(resumed=checkpoint is not None)
        self.engine()  # Hooks must be there before anything compiles the model.
        self._jd_compiled = CompiledParts(self, self.jd_outputs.modules)
        check_given(self, checkpoint)

    def _forget(self) -> None:
        self.jd_state: JDState | None = None
        self.jd_metrics = Averages()
        self.jd_apart = False
        self.jd_items: Any = None
        self.jd_hooked: set[nn.Parameter] = set()
        self.jd_streams: RandomState | None = None  # the random streams' state before the forward
        self._jd_batches: list[Any] = []
        self._jd_seen = 0
        self._jd_update: Update | None = None
        self._jd_logged: Any = 0.0  # for the update's micro-batches so far
        self._jd_broken_in_a_row = 0
        self.forget_losses()

    def _leave_model(self) -> None:
        """Remove the engine's hooks and free its graphs, so that the model is as before."""
        if self._jd_engine is not None:
            self._jd_engine[1].detach()
        if self._jd_compiled is not None:
            self._jd_compiled.undo()
        self.jd_outputs.remove()
        self._jd_engine = self._jd_compiled = self._jd_update = self.jd_inputs = self.jd_streams = None
        self._jd_batches = []

    def follow_flags(self) -> None:
        """Apply the flags, before each run: a search changes them for each trial."""
        self.jd_control = follow_flags(self, self._jd_from_flags)

    def get_train_dataloader(self) -> Any:
        """Make batches include their number of examples; see Trainer."""
        collator = self.data_collator
        self.data_collator = ExampleCounter(collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Keep the micro-batches of an update, for `training_step`; see Trainer."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._jd_batches = list(batches)
        self._jd_seen = 0
        check_same_weights(self)
        return batches, num_items_in_batch

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run Trainer's own step with its backward replaced; at the last micro-batch, add the update to `.grad`.

        Returns:
            The value that Trainer's own step returns, for its log.
        """
        self.engine()  # sets its hooks before the forward
        self.jd_items = num_items_in_batch
        self._jd_seen += 1
        alone = self.jd_args.jd_scope == "micro_batch" or self.jd_apart
        if self._jd_update is None:
            self._jd_update = Update(self, model, [inputs] if alone else self._jd_batches or [inputs], alone)
        step = super().training_step
        update = self._jd_update
        with self.unreduced_first(), update.measuring_unless_raised():
            value = update.take(inputs, lambda called, batch: step(called, batch, num_items_in_batch))
            if not update.alone and self._jd_seen < len(self._jd_batches):
                self._jd_logged = self._jd_logged + value
                return value
            self._jd_update = None
            update.finish()
        if update.logged is not None:
            value = update.logged.to(value) - self._jd_logged
        self._jd_logged = torch.zeros_like(value)
        return value

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)
        # A step that removes the labels from its copy leaves these unchanged.
        self.jd_inputs = copy(prepared) if isinstance(prepared, MutableMapping) else prepared
        self.jd_streams = random_state(self.args.device)
        return prepared

    def jd_instances(self, output: Tensor, instances: int) -> Tensor:
        """Assign the leading rows of an output to examples: override this method if a loss pairs rows differently.

        Args:
            output: [N, ...] an output of the model that the loss reads.
            instances: B, the number of examples in the batch; N is a multiple of it.

        Returns:
            [N] the index of each row's example, int64. By default, row n belongs to example n % B: this fits one call
            on [chosen, rejected].

        Raises:
            ValueError: Shapes suggest another order.
        """
        if not self.jd_outputs.tells_order(len(output), instances):
            raise ValueError(
                f"The batch has {instances} examples, but the loss reads an output of shape {list(output.shape)}, "
                f"whose row n may belong to example n % {instances}, to example n // {len(output) // instances}, or to "
                "a token of all examples: say which in `jd_instances`, or choose --jd_objectives batch."
            )
        return torch.arange(len(output)) % instances

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, with a `backward` that can be replaced; see Trainer."""
        super().create_accelerator_and_postprocess()
        backward = self.accelerator.backward

        def replaced(loss: Tensor, **kwargs: Any) -> None:
            if self.jd_backward is None:
                backward(loss, **kwargs)
            else:
                self.jd_retain_graph = bool(kwargs.get("retain_graph"))
                self.jd_backward(loss)
                self.jd_retain_graph = False

        self.accelerator.backward = replaced

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the metrics under `jd/` to the logs of training; see Trainer."""
        averages = self.jd_metrics.take() if "loss" in logs or "train_loss" in logs else {}
        logs.update(readable(averages))
        super().log(logs, *args, **kwargs)
        if self.is_world_process_zero() and self.args.output_dir is not None:
            entry = {**self.state.log_history[-1], "max_steps": self.state.max_steps}
            folder = self._get_output_dir(getattr(self, "_trial", None))  # differs for each trial of a search
            self.jd_log.write(Path(folder), entry, pairs(averages))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A checkpoint that overwrites another one must not look complete until it is.
        run = Path(self._get_output_dir(trial=trial))
        if self.args.should_save:
            (run / f"checkpoint-{self.state.global_step}" / STATE_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_weighting(self.jd_control, Path(output_dir))
            self.jd_control.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_weighting(self.jd_control, Path(checkpoint), self.engine().blocks is not None)
            self.jd_control.load(Path(checkpoint))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.jd_args.jd_sampler == "trainer":
            return super()._get_train_sampler(train_dataset)
        return stratified_sampler(self, self.train_dataset if train_dataset is None else train_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is not None:
            return
        super()._set_signature_columns_if_needed()
        column = self.jd_args.jd_group_column
        assert self._signature_columns is not None
        self.jd_model_takes_groups = column in self._signature_columns
        if column is not None and not self.jd_model_takes_groups:
            self._signature_columns.append(column)

    # ---- What an update needs ----

    @property
    def takes_whole_gradients(self) -> bool:
        """Whether rows are gradients of whole losses, as they come, not of shares of one loss."""
        return self.jd_args.kind.of_batches or self.jd_args.kind.of_rewards or self.tells_losses_apart

    @property
    def recorder_class(self) -> type[Recorder]:
        """How micro-batches become rows."""
        return Recorder

    def groups_before(self, batch: Any) -> Tensor | None:
        """Return the ids of the groups that a batch may have, before its step, if it has groups."""
        return group_ids(batch)

    def objective_names(self) -> list[str] | None:
        """Return the names of all objectives, if known before training."""
        return self.jd_group_names

    def trainable(self) -> list[nn.Parameter]:
        """Return the trainable parameters, in the same order on all processes."""
        assert self.model is not None
        if self._jd_update is not None:
            return self._jd_update.trainable  # The walk over all modules takes time.
        return [p for p in self.model.parameters() if p.requires_grad]

    def engine(self) -> Engine:
        """Return the engine of the current model: `model_init` may have built a new one."""
        assert self.model is not None
        if self._jd_engine is None or self._jd_engine[0] is not self.model:
            self._leave_model()
            blocks = None if self.jd_args.jd_blocks == "none" else self.jd_args.jd_blocks
            options: dict[str, Any] = {"check": self.jd_args.jd_check, "blocks": blocks, **self.jd_engine_options}
            self._jd_engine = (self.model, Engine(self.model, **options))
            inner = getattr(self.model, "get_base_model", None)  # Some losses call the model inside a PEFT model.
            self.jd_outputs = OutputObserver([self.model] if inner is None else [self.model, inner()])
        return self._jd_engine[1]

    @property
    def jd_backend(self) -> Backend:
        """The backend that this trainer runs on."""
        return backend_of(self)

    def count_broken(self, broken: bool) -> None:
        """Count the updates in a row in which something wasn't finite, and stop after `--jd_max_non_finite`."""
        self._jd_broken_in_a_row = self._jd_broken_in_a_row + 1 if broken else 0
        if self._jd_broken_in_a_row >= self.jd_args.jd_max_non_finite:
            raise ValueError(
                f"{self._jd_broken_in_a_row} updates in a row had losses or gradients that aren't finite, the last one "
                f"being {self.state.global_step + 1}; the parameters are still finite. Lower the learning rate, look "
                "at the data that the log names, or allow more with --jd_max_non_finite."
            )


class JDTrainer(JDTrainerMixin, Trainer):
    """`Trainer` with Jacobian descent; its `args` are `JDTrainingArguments`."""


class JDSeq2SeqTrainer(JDTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with Jacobian descent; its `args` are `JDSeq2SeqTrainingArguments`."""

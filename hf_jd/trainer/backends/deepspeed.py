"""DeepSpeed: its engine owns the backward pass, `.grad` and the optimizer's step, so an update takes two passes.

The first pass measures rows on the model inside the engine, with `autograd.grad`, so that the engine's hooks ignore it.
The second passes the weighted losses to the engine, once per micro-batch; at the last one, accelerate makes it step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from hf_jd.distributed.processes import process_count
from hf_jd.trainer.backends.base import Backend
from hf_jd.trainer.backends.zero3 import measuring
from hf_jd.trainer.splitting.cotangents import OutputObserver


class DeepSpeed(Backend):
    """See `Backend`."""

    owns_backward = True
    shards = True

    def check(self) -> None:
        """Raise a ValueError for set-ups that this backend can't train."""
        jd, name = self.trainer.jd_args, type(self.trainer).__name__
        if jd.jd_blocks != "none":
            raise ValueError(
                "DeepSpeed owns the backward pass, which descends weighted losses, and with --jd_blocks each block of "
                "parameters has separate weights: leave --jd_blocks at none, or use DDP or FSDP2."
            )
        if jd.jd_backward != "two_pass":
            raise ValueError(
                "DeepSpeed owns the backward pass, so that an update takes two: add --jd_backward two_pass."
            )
        if self.trainer.accelerator.state.deepspeed_plugin.deepspeed_config.get("fp16", {}).get("enabled") is True:
            raise ValueError(
                "DeepSpeed scales losses in fp16, but only in its own pass, so small gradients vanish from the rows: "
                "use --bf16, or DDP. (--fp16_full_eval switches DeepSpeed's fp16 on, too.)"
            )
        if jd.jd_every > 1 or jd.jd_warmup_steps or jd.jd_monitor_every:
            raise ValueError(
                "--jd_every, --jd_warmup_steps and --jd_monitor_every use plain steps in between, which do not work "
                "with DeepSpeed yet: measure at every update, or use DDP or FSDP2."
            )
        super().check()
        if self.trainer.takes_whole_gradients:
            raise ValueError(
                f"--jd_objectives {jd.jd_objectives} of {name} takes gradients as they come, which DeepSpeed keeps for "
                "itself: use DDP or FSDP2."
            )

    def measured(self, model: nn.Module) -> nn.Module:
        """Return the model inside DeepSpeed's engine.

        The engine's forward prepares its own reduction, which any backward from the outputs would start.
        """
        return self.trainer.accelerator.unwrap_model(model)

    @contextmanager
    def measuring(self, model: nn.Module) -> Generator[None]:
        """Prepare the wrapped model for a measuring pass, which has to begin behind DeepSpeed's hooks."""
        with measuring(model, self.trainer.engine()):
            self.trainer.jd_outputs.renew()
            yield

    def divisor(self) -> int:
        """Return the number by which accelerate and the backend divide a loss."""
        return process_count()

    def descend(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Pass the weighted losses of an update to the engine, and let it step at the last one.

        The engine averages over processes, and all of them have to call it, with losses or without.
        """
        accelerator, trainer = self.trainer.accelerator, self.trainer
        steps = accelerator.gradient_state.sync_gradients
        for i, loss in enumerate(losses):
            accelerator.gradient_state._set_sync_gradients(steps and i == len(losses) - 1)
            # The engine mistakes any backward pass through its outputs for its own, even one of the loss alone.
            assert trainer.model_wrapped is not None
            outputs, trainer.jd_outputs = trainer.jd_outputs, OutputObserver([trainer.model_wrapped], apart=True)
            try:
                total = loss()
            finally:
                trainer.jd_outputs.remove()
                trainer.jd_outputs = outputs
            accelerator.backward(total * process_count(), scale_wrt_gas=False)
        accelerator.gradient_state._set_sync_gradients(steps)

    def optimizer_files(self) -> list[str]:
        """Return the checkpoint files with the states of optimizer and schedule, which the engine writes."""
        plugin = self.trainer.accelerator.state.deepspeed_plugin
        shards = range(self.trainer.args.world_size) if plugin.zero_stage else []
        files = [f"global_step*/*zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in shards]
        return files if "scheduler" in plugin.deepspeed_config else [*files, "scheduler.pt"]

"""The interface of all backends, and the backend for one process or DDP, whose reducer never acts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_jd.distributed.processes import process_count
from hf_jd.trainer.gradients import set_aside

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin


class Backend:
    """How an update runs on one process or with DDP; other backends override what they do differently.

    Args:
        trainer: The trainer with the model.

    Attributes:
        owns_backward: Whether the backend takes gradients only from its own backward pass, and so needs the weighted
            losses in a second pass.
        shards: Whether each process stores only a part of the parameters.
    """

    owns_backward = False
    shards = False

    def __init__(self, trainer: JDTrainerMixin):
        self.trainer = trainer

    def check(self) -> None:
        """Raise a ValueError for set-ups that this backend can't train."""
        trainer, name, model = self.trainer, type(self.trainer).__name__, self.trainer.model
        assert model is not None
        if trainer.args.n_gpu > 1:
            raise ValueError(
                f"{name} does not work under DataParallel ({trainer.args.n_gpu} GPUs in one process): start one "
                "process per GPU with `accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES=0."
            )
        layout = trainer.accelerator.parallelism_config
        sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
        if (layout is not None and layout.dp_replicate_enabled) or any(p.device_mesh.ndim > 1 for p in sharded):
            raise ValueError(
                f"{name} does not work with replicas of shards (HSDP), since each process owns a part of the Gramian: "
                "use FSDP2 over all processes, with dp_replicate_size 1."
            )
        spread = bool(sharded) and not self.shards_model(model)
        if spread or max(trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()) > 1:
            raise ValueError(
                f"{name} does not work with tensor, context or sequence parallelism: load the model without a tp_plan, "
                "and use DDP, or FSDP2 where one GPU can't hold it."
            )
        devices = sorted({str(device) for device in getattr(model, "hf_device_map", {}).values()})
        if len(devices) > 1:
            raise ValueError(
                f"The model is spread over the devices {', '.join(devices)}: load it without device_map, and start one "
                "process per GPU with `accelerate launch`, with FSDP2 where one GPU can't hold it."
            )

    def shards_model(self, model: nn.Module) -> bool:
        """Return whether this backend has sharded the model's parameters."""
        return False

    def measured(self, model: nn.Module) -> nn.Module:
        """Return the model on which to measure rows, from the one that Trainer has wrapped."""
        return model

    def measuring(self, model: nn.Module) -> AbstractContextManager[None]:
        """Prepare the wrapped model for a pass that measures rows."""
        return nullcontext()

    def divisor(self) -> int:
        """Return the number by which accelerate and the backend divide a loss."""
        return self.trainer.accelerator.gradient_accumulation_steps * process_count()

    def gradient(self, loss: Tensor) -> dict[nn.Parameter, Tensor]:
        """Compute the plain gradient of a loss; leave `.grad` unchanged, and free the graph."""
        with set_aside(self.trainer.trainable()) as gradients:
            if loss.requires_grad:
                loss.backward()
        return gradients

    def descend(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Pass the weighted losses of an update to a backend that owns the backward pass, one by one."""
        raise NotImplementedError

    def optimizer_files(self) -> list[str]:
        """Return the checkpoint files with the states of optimizer and schedule."""
        return ["optimizer.pt", "scheduler.pt"]

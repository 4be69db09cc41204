"""FSDP2: parameters are only whole inside passes, and its own reduction never acts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from hf_jd.distributed.processes import process_count
from hf_jd.trainer.backends.base import Backend


class FSDP2(Backend):
    """See `Backend`. Every pass gathers parameters, so all processes run the same number."""

    shards = True

    def check(self) -> None:
        """Raise a ValueError for set-ups that this backend can't train."""
        plugin: Any = self.trainer.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(
                f"{type(self.trainer).__name__} does not work with FSDP1, which hides the parameters in flat ones: use "
                'FSDP2, with `fsdp_version: 2` in the configuration of accelerate, or "fsdp_version": 2 in '
                "--fsdp_config."
            )
        super().check()
        processes = process_count()
        for p in self.trainer.trainable():
            if isinstance(p, DTensor) and (p.device_mesh.size() != processes or p.placements != (Shard(0),)):
                raise ValueError(
                    f"A parameter is placed as {p.placements} on {p.device_mesh.size()} of {processes} processes; use "
                    "FSDP2 over all processes, along the first dimension (no replicas, as in HSDP)."
                )

    def shards_model(self, model: nn.Module) -> bool:
        """Return whether this backend has sharded the model's parameters."""
        return isinstance(model, FSDPModule)

    def gradient(self, loss: Tensor) -> dict[nn.Parameter, Tensor]:
        """Compute the plain gradient of a loss, for whole parameters.

        FSDP2's own reduction would keep gradients that it must not reduce, and add them to the next step.
        """
        engine = self.trainer.engine()
        gradients = engine.gradients(loss)
        engine.keep_up(loss)
        return gradients

    def optimizer_files(self) -> list[str]:
        """Return the checkpoint files with the states of optimizer and schedule."""
        plugin: Any = self.trainer.accelerator.state.fsdp_plugin
        return ["optimizer.bin" if "FULL" in str(plugin.state_dict_type) else "optimizer_0", "scheduler.pt"]

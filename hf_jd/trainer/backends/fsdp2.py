"""FSDP2: parameters are whole inside passes only, and its own reduction never acts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_jd.trainer.backends.base import Backend


class FSDP2(Backend):
    """See `Backend`. Every pass gathers parameters, so all processes make as many."""

    shards = True

    def check(self) -> None:
        """Raises a ValueError for what can't be trained in this way."""
        plugin: Any = self.trainer.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(
                f"{type(self.trainer).__name__} does not work with FSDP1, which hides the parameters in flat ones: use "
                'FSDP2, with `fsdp_version: 2` in the configuration of accelerate, or "fsdp_version": 2 in '
                "--fsdp_config."
            )
        super().check()

    def shards_model(self, model: nn.Module) -> bool:
        """Whether it is this backend that has sharded the model's parameters."""
        return isinstance(model, FSDPModule)

    def gradient(self, loss: Tensor) -> dict[nn.Parameter, Tensor]:
        """The plain gradient of a loss, of whole parameters.

        FSDP2's own reduction would keep what it is not to reduce, and add it to the next step.
        """
        engine = self.trainer.engine()
        gradients = engine.gradients(loss)
        engine.keep_up(loss)
        return gradients

    def optimizer_files(self) -> list[str]:
        """What Trainer calls the states of optimizer and schedule in a checkpoint."""
        plugin: Any = self.trainer.accelerator.state.fsdp_plugin
        return ["optimizer.bin" if "FULL" in str(plugin.state_dict_type) else "optimizer_0", "scheduler.pt"]

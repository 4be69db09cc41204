"""Which of accelerate's engines trains: what each one can't do, said before training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin


def check_engine(trainer: JDTrainerMixin) -> None:
    """Raises a ValueError for ways to use many devices that don't work."""
    name, model = type(trainer).__name__, trainer.model
    assert model is not None
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{name} does not work under DataParallel ({trainer.args.n_gpu} GPUs in one process): start one process a "
            "GPU with `accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            f"{name} does not work with FSDP1, which hides the parameters in flat ones: use FSDP2, with "
            '`fsdp_version: 2` in the configuration of accelerate, or "fsdp_version": 2 in --fsdp_config.'
        )
    if trainer.is_deepspeed_enabled:
        _check_deepspeed(trainer)
    layout = trainer.accelerator.parallelism_config
    sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
    if (layout is not None and layout.dp_replicate_enabled) or any(p.device_mesh.ndim > 1 for p in sharded):
        raise ValueError(
            f"{name} does not work with replicas of shards (HSDP), since each process owns a part of the Gramian: use "
            "FSDP2 over all processes, with dp_replicate_size 1."
        )
    spread = bool(sharded) and not isinstance(model, FSDPModule)
    if spread or max(trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()) > 1:
        raise ValueError(
            f"{name} does not work with tensor, context or sequence parallelism: load the model without a tp_plan, and "
            "use DDP, or FSDP2 where one GPU can't hold it."
        )
    devices = sorted({str(device) for device in getattr(model, "hf_device_map", {}).values()})
    if len(devices) > 1:
        raise ValueError(
            f"The model is spread over the devices {', '.join(devices)}: load it without device_map, and start one "
            "process a GPU with `accelerate launch`, with FSDP2 where one GPU can't hold it."
        )


def _check_deepspeed(trainer: JDTrainerMixin) -> None:
    if trainer.jd_args.jd_backward != "two_pass":
        raise ValueError("DeepSpeed owns the backward pass, so that an update takes two: add --jd_backward two_pass.")
    if trainer.accelerator.state.deepspeed_plugin.deepspeed_config.get("fp16", {}).get("enabled") is True:
        raise ValueError(
            "DeepSpeed scales losses in fp16, and only in its own pass, so that small gradients vanish from the rows: "
            "use --bf16, or DDP. (--fp16_full_eval switches fp16 on for it, too.)"
        )

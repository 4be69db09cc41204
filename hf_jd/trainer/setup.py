"""What can't be trained, said before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_jd.checkpoints import check_room, check_writable
from hf_jd.trainer.engines import check_engine
from hf_jd.trainer.own_loss import check_compute_loss

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin


def check_setup(trainer: JDTrainerMixin) -> None:
    """Raises a ValueError for what can't be trained."""
    if not trainer.trainable():
        raise ValueError("The model has no trainable parameter: add an adapter, or unfreeze some parameters.")
    unknown = set(trainer.jd_args.jd_ascend or []) - set(trainer.jd_group_names or trainer.jd_args.jd_ascend or [])
    if unknown:
        raise ValueError(
            f"--jd_ascend names {', '.join(f'`{n}`' for n in sorted(unknown))}, which is no group of the training "
            f"set; its groups are {', '.join(f'`{n}`' for n in trainer.jd_group_names or [])}."
        )
    if trainer.jd_args.jd_sampler != "trainer" and not hasattr(trainer.train_dataset, "__len__"):
        raise ValueError(
            f"--jd_sampler {trainer.jd_args.jd_sampler} orders the examples, and those of a stream come as they come: "
            "use a dataset with a length, or --jd_sampler trainer."
        )
    check_compute_loss(trainer)
    check_engine(trainer)
    spared = trainer.jd_args.jd_every > 1 or trainer.jd_args.jd_warmup_steps or trainer.jd_args.jd_monitor_every
    beside_ddp = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if spared and beside_ddp:
        raise ValueError(
            "--jd_every, --jd_warmup_steps and --jd_monitor_every leave updates to a plain step, which does not work "
            "with FSDP2 and DeepSpeed yet: measure at every update, or use DDP."
        )
    several = trainer.jd_args.kind.several or trainer.jd_args.jd_extra_losses == "objective"
    if several and beside_ddp:
        raise ValueError(
            f"{type(trainer).__name__} does not weigh several losses by name under FSDP2 or DeepSpeed yet: use DDP, or "
            "add them up in `compute_losses` and choose --jd_objectives instance, with --jd_extra_losses mean."
        )
    if trainer.args.use_liger_kernel:
        raise ValueError("Liger's fused loss keeps no loss of each token: switch --use_liger_kernel off.")
    if trainer.args.should_save and trainer.args.save_strategy != "no" and trainer.args.output_dir is not None:
        check_writable(Path(trainer.args.output_dir))
        assert trainer.model is not None
        check_room(Path(trainer.args.output_dir), trainer.model, hasattr(trainer.model, "peft_config"))
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if "lomo" in optimizer or "layerwise" in optimizer:
        raise ValueError(
            f"The optimizer `{optimizer}` steps inside the backward pass, before any weights are known: choose "
            "another one with --optim."
        )

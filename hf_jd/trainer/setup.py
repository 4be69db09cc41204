"""What can't be trained, said before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_jd.checkpoints import check_room, check_writable
from hf_jd.trainer.engines import check_engine

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
    check_engine(trainer)
    _check_own_loss(trainer)
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


def _check_own_loss(trainer: JDTrainerMixin) -> None:
    """Raises a ValueError for what needs the losses' values, where only a scalar of the trainer's own is known."""
    jd, name = trainer.jd_args, type(trainer).__name__
    if jd.kind.several and trainer.has_own_loss:
        raise ValueError(
            f"--jd_objectives {jd.jd_objectives} weighs several losses by name, and {name}.compute_loss returns "
            "one: return a dict of losses from `compute_losses`, or choose --jd_objectives instance."
        )
    if not trainer.splits_loss:
        return
    asked = {
        "--jd_backward two_pass": jd.jd_backward == "two_pass",
        "--jd_normalize loss": jd.jd_normalize == "loss",
        f"--jd_extra_losses {jd.jd_extra_losses}": jd.jd_extra_losses != "mean",
        f"the weighting `{jd.jd_weighting}`": getattr(trainer.weighting, "reads", "gramian") != "gramian",
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP2": trainer.is_fsdp_enabled,
    }
    flags = [flag for flag, given in asked.items() if given]
    if flags:
        what = (
            f"the `compute_loss` of {name} returns"
            if trainer.has_own_loss
            else f"--jd_objectives {jd.jd_objectives} takes"
        )
        raise ValueError(
            f"{flags[0]} needs the value of each objective, and {what} one for the whole batch: leave it out, or "
            "override `compute_losses` and return unreduced losses."
        )

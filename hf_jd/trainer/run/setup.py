"""Before training: build what the flags ask for, and refuse set-ups that can't work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_jd.arguments import JDArguments
from hf_jd.checkpoints import check_room, check_writable
from hf_jd.collator import GroupCollator
from hf_jd.contradictions import check_blocks, listed
from hf_jd.groups import group_names
from hf_jd.trainer.overrides import overridden, warn_of_gradients
from hf_jd.trainer.splitting.values import check_values_are_not_needed
from hf_jd.trainer.step.control import Control
from hf_jd.trainer.step.foreign_weightings import as_weighting
from hf_jd.weighting import Weighting

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin


@dataclass
class FromFlags:
    """The objects built from flags, to tell them apart from the user's.

    Attributes:
        weighting: The weighting from the flags; None if the user passed one.
        named: Its name and arguments.
        source: The training set, the group column and the groups, from which the groups' names were read.
        collator: The collator that adds the groups.
    """

    weighting: Weighting | None = None
    named: tuple[str, ...] | None = None
    source: tuple[Any, str | None, list[str] | None] = (None, None, None)
    collator: GroupCollator | None = None


def follow_flags(trainer: JDTrainerMixin, made: FromFlags) -> Control:
    """Build the weighting, the groups' names and the collator from the current flags.

    Args:
        trainer: The trainer with the flags.
        made: The objects built for this trainer before.

    Returns:
        The control.

    Raises:
        ValueError: A flag has a value that isn't allowed, or contradicts another flag or the trainer's arguments.
    """
    jd = trainer.args
    if not isinstance(jd, JDArguments):
        raise ValueError(
            f"The arguments of {type(trainer).__name__} are {type(jd).__name__}, without the --jd_* flags: use "
            "JDTrainingArguments."
        )
    jd.validate()
    _follow_weighting(trainer, jd, made)
    _follow_groups(trainer, jd, made)
    return Control(jd, trainer.weighting, trainer.objective_names())


def _follow_weighting(trainer: JDTrainerMixin, jd: JDArguments, made: FromFlags) -> None:
    named = (jd.jd_weighting, *(jd.jd_weighting_args or []))
    if trainer.weighting is None or trainer.weighting is made.weighting:
        trainer.weighting = made.weighting = jd.build_weighting()
    elif made.named not in (None, named):
        raise ValueError(
            f"--jd_weighting is now `{' '.join(named)}`, and was `{' '.join(made.named)}`, but the trainer was given a "
            "`weighting`, which overrides it: leave that out, or leave the flag unchanged."
        )
    trainer.weighting = as_weighting(trainer.weighting)
    made.named = named


def _follow_groups(trainer: JDTrainerMixin, jd: JDArguments, made: FromFlags) -> None:
    source = (trainer.train_dataset, jd.jd_group_column, jd.jd_groups)
    if any(now is not before for now, before in zip(source, made.source, strict=True)):
        trainer.jd_group_names = jd.jd_groups
        if jd.jd_group_column is not None and trainer.train_dataset is not None:
            trainer.jd_group_names = group_names(trainer.train_dataset, jd.jd_group_column, jd.jd_groups)
        trainer._signature_columns = None  # These name the column, which Trainer must not drop.
        made.source = source
    if made.collator is not None and trainer.data_collator is made.collator:
        trainer.data_collator = made.collator.collator
    if jd.jd_group_column is not None:
        trainer._set_signature_columns_if_needed()
        made.collator = GroupCollator(
            trainer.data_collator, jd.jd_group_column, trainer.jd_group_names, keep=trainer.jd_model_takes_groups
        )
        trainer.data_collator = made.collator


def check_setup(trainer: JDTrainerMixin) -> None:
    """Raise a ValueError if training can't work, and warn of what won't do what it seems to."""
    if not trainer.trainable():
        raise ValueError("The model has no trainable parameter: add an adapter, or unfreeze some parameters.")
    unknown = set(trainer.jd_args.jd_ascend or []) - set(trainer.jd_group_names or trainer.jd_args.jd_ascend or [])
    if unknown:
        raise ValueError(
            f"--jd_ascend names {listed(sorted(unknown))}, which is no group of the training set; its groups are "
            f"{listed(trainer.jd_group_names or [])}."
        )
    if trainer.jd_args.jd_sampler != "trainer" and not hasattr(trainer.train_dataset, "__len__"):
        raise ValueError(
            f"--jd_sampler {trainer.jd_args.jd_sampler} orders the examples, but a stream has its own order: use a "
            "dataset with a length, or --jd_sampler trainer."
        )
    check_blocks(trainer.jd_args, trainer.jd_engine_options.get("blocks"))
    trainer.jd_backend.check()
    _check_losses(trainer)
    warn_of_gradients(trainer)
    check_liger(trainer)
    if trainer.args.should_save and trainer.args.save_strategy != "no" and trainer.args.output_dir is not None:
        check_writable(Path(trainer.args.output_dir))
        assert trainer.model is not None
        check_room(Path(trainer.args.output_dir), trainer.model, hasattr(trainer.model, "peft_config"))
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if "lomo" in optimizer or "layerwise" in optimizer:
        raise ValueError(
            f"The optimizer `{optimizer}` steps inside the backward pass, before the weights are known: choose "
            "another one with --optim."
        )


def check_liger(trainer: JDTrainerMixin) -> None:
    """Raise a ValueError for Liger's kernels, which Trainer applies to the model first of all."""
    if trainer.args.use_liger_kernel:
        raise ValueError("Liger's fused loss computes no loss per token: switch --use_liger_kernel off.")


def _check_losses(trainer: JDTrainerMixin) -> None:
    """Raise a ValueError for flags that the trainer's loss doesn't allow."""
    jd, name, whose = trainer.jd_args, type(trainer).__name__, overridden(trainer)
    if jd.kind.of_rewards and not hasattr(trainer, "advantages_by_reward"):
        raise ValueError(
            f"--jd_objectives reward weighs the reward functions of JDGRPOTrainer and JDRLOOTrainer, but {name} is "
            "neither: use one of these, or choose other objectives."
        )
    if jd.kind.several and whose == "compute_loss" and not trainer.tells_losses_apart:
        raise ValueError(
            f"--jd_objectives {jd.jd_objectives} weighs several losses by name, but {name}.compute_loss returns "
            "one: return a dict of losses from `compute_losses`, or choose --jd_objectives instance."
        )
    unvalued = jd.kind.of_batches or not (trainer.knows_losses or whose == "compute_losses" or trainer.jd_loss_func)
    if unvalued and (trainer.tells_losses_apart or not jd.kind.several):
        what = f"--jd_objectives {jd.jd_objectives} takes" if jd.kind.of_batches else f"the loss of {name} is"
        check_values_are_not_needed(trainer, what)
    if trainer.takes_whole_gradients and (jd.jd_extra_losses != "mean" or jd.jd_backward == "two_pass"):
        raise ValueError(
            f"--jd_objectives {jd.jd_objectives} of {name} takes gradients as they come: leave --jd_extra_losses at "
            "mean, and --jd_backward at one_pass."
        )

"""Which checkpoint a run goes on from, and what a weighting remembers of the steps before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from hf_jd.checkpoints import newest_whole, what_is_missing
from hf_jd.trainer.control import WEIGHTS_FILE
from hf_jd.weighting import Stateful

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin

WEIGHTING_FILE = "jd_weighting.pt"
"""What a weighting remembers of past steps, in each checkpoint."""

logger = logging.get_logger(__name__)


def checkpoint_to_resume(trainer: JDTrainerMixin, asked: str | bool) -> str | bool | None:
    """The checkpoint that is asked for, or the newest whole one of the output directory."""
    needed = needed_files(trainer)
    if not isinstance(asked, bool):
        missing = what_is_missing(Path(asked), needed) if Path(asked).is_dir() else "there is no such directory"
        if missing is not None:
            logger.warning(f"The checkpoint `{asked}` can't be resumed as it was: {missing}.")
        return asked
    assert trainer.args.output_dir is not None
    found, skipped = newest_whole(Path(trainer.args.output_dir), needed)
    for name, missing in skipped.items():
        logger.warning(f"Skipping {name}, which was not written to its end: {missing}.")
    if found is None and skipped:
        logger.warning("No checkpoint is whole: training starts at the beginning.")
        return None
    return True if found is None else str(found)


def needed_files(trainer: JDTrainerMixin) -> list[str]:
    """What a checkpoint must have beside the model's weights and Trainer's state, of all processes."""
    if trainer.args.save_only_model:
        return []
    processes = range(trainer.args.world_size)
    states = ["rng_state.pth"] if len(processes) == 1 else [f"rng_state_{i}.pth" for i in processes]
    needed = [*_optimizer_files(trainer), *states]
    needed += [WEIGHTING_FILE] if isinstance(trainer.weighting, Stateful) else []
    return needed + ([WEIGHTS_FILE] if trainer.jd_args.jd_every > 1 else [])


def _optimizer_files(trainer: JDTrainerMixin) -> list[str]:
    """What Trainer calls the states of optimizer and schedule; FSDP2 and DeepSpeed write theirs into a folder."""
    if trainer.is_deepspeed_enabled:
        plugin = trainer.accelerator.state.deepspeed_plugin
        shards = range(trainer.args.world_size) if plugin.zero_stage else []
        own = [f"global_step*/*zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in shards]
        return own if "scheduler" in plugin.deepspeed_config else [*own, "scheduler.pt"]
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is None:
        return ["optimizer.pt", "scheduler.pt"]
    return ["optimizer.bin" if "FULL" in str(plugin.state_dict_type) else "optimizer_0", "scheduler.pt"]


def save_weighting(weighting: object, checkpoint: Path) -> None:
    """Adds to a checkpoint what the weighting remembers, if it does."""
    if isinstance(weighting, Stateful):
        torch.save(weighting.state_dict(), checkpoint / WEIGHTING_FILE)


def load_weighting(weighting: object, checkpoint: Path) -> None:
    """Gives back to a weighting what it remembered in a checkpoint, if that has it."""
    file = checkpoint / WEIGHTING_FILE
    if isinstance(weighting, Stateful) and file.is_file():
        weighting.load_state_dict(torch.load(file))

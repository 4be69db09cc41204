"""Choose the checkpoint to resume from, and save and load a weighting's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_jd.checkpoints import newest_whole, what_is_missing
from hf_jd.trainer.backends import backend_of
from hf_jd.trainer.step.control import WEIGHTS_FILE, Control
from hf_jd.weighting import Stateful

if TYPE_CHECKING:
    from hf_jd.trainer.mixin import JDTrainerMixin

WEIGHTING_FILE = "jd_weighting.pt"
"""The file with a weighting's memory of past steps, in each checkpoint."""

_OF_BLOCKS = "of_blocks"  # in that file, by the names of blocks

logger = logging.get_logger(__name__)


def checkpoint_to_resume(trainer: Trainer, checkpoint: str | bool, needed: Sequence[str]) -> str | None:
    """Return the given checkpoint, or the newest complete one in the output directory.

    Args:
        trainer: Trainer's own, or ours.
        checkpoint: A checkpoint's directory; True, `last` or `true` for the newest complete one.
        needed: Files that a checkpoint must have; see `needed_files`.

    Returns:
        Its directory; None if there are checkpoints, but none is complete: training then starts from the beginning.

    Raises:
        ValueError: There is no checkpoint, or the given one can't be read.
    """
    if not isinstance(checkpoint, bool) and checkpoint.lower() not in ("last", "true"):
        _check_readable(Path(checkpoint), needed)
        return checkpoint
    assert trainer.args.output_dir is not None
    newest, skipped = newest_whole(Path(trainer.args.output_dir), needed)
    if newest is None and not skipped:
        raise ValueError(
            f"The output directory `{trainer.args.output_dir}` holds no checkpoint to resume: leave "
            "--resume_from_checkpoint out to start from the beginning."
        )
    for name, missing in skipped.items():
        logger.warning(f"Skipping {name}, which is incomplete: {missing}.")
    if newest is None:
        logger.warning("No checkpoint is complete: training starts from the beginning.")
    return None if newest is None else str(newest)


def _check_readable(checkpoint: Path, needed: Sequence[str]) -> None:
    """Refuse a checkpoint that would make Trainer fail, and warn about files that it would do without."""
    if not checkpoint.is_dir():
        raise ValueError(f"There is no checkpoint `{checkpoint}` to resume: there is no such folder.")
    broken = what_is_missing(checkpoint, [name for name in needed if any(checkpoint.glob(name))])
    if broken is not None:
        raise ValueError(
            f"The checkpoint `{checkpoint}` can't be resumed: {broken}. Use another one, or the newest complete one "
            "with resume_from_checkpoint=True (`last` on the command line)."
        )
    missing = what_is_missing(checkpoint, needed)
    if missing is not None:
        logger.warning(f"The checkpoint `{checkpoint}` can't be resumed exactly: {missing}.")


def needed_files(trainer: JDTrainerMixin) -> list[str]:
    """List the files that a checkpoint must have, for all processes, besides weights and Trainer's state."""
    needed = trainer_files(trainer)
    if trainer.args.save_only_model:
        return needed
    needed += [WEIGHTING_FILE] if isinstance(trainer.weighting, Stateful) else []
    return needed + ([WEIGHTS_FILE] if trainer.jd_args.jd_every > 1 else [])


def trainer_files(trainer: Trainer) -> list[str]:
    """List the same, but only Trainer's own files."""
    if trainer.args.save_only_model:
        return []
    processes = range(trainer.args.world_size)
    states = ["rng_state.pth"] if len(processes) == 1 else [f"rng_state_{i}.pth" for i in processes]
    return [*backend_of(trainer).optimizer_files(), *states]


def save_weighting(control: Control, checkpoint: Path) -> None:
    """Save the weighting's memory to a checkpoint: its `state_dict()`, if it has one and it isn't empty."""
    of_blocks = {block: _state(weighting) for block, weighting in control.of_blocks.items()}
    state = {_OF_BLOCKS: of_blocks} if any(of_blocks.values()) else _state(control.weighting)
    if state:
        torch.save(state, checkpoint / WEIGHTING_FILE)


def _state(weighting: object) -> Any:
    state_dict = getattr(weighting, "state_dict", None)
    return state_dict() if callable(state_dict) else None


def load_weighting(control: Control, checkpoint: Path, by_block: bool) -> None:
    """Load a weighting's memory from a checkpoint; warn if the weighting may have one, but it wasn't saved.

    Args:
        control: The control that has the weighting.
        checkpoint: The checkpoint to resume from.
        by_block: Whether each block of parameters has its own weighting. If the checkpoint has the memory of one
            weighting for all parameters, each block starts from it.
    """
    file, weighting = checkpoint / WEIGHTING_FILE, control.weighting
    state = torch.load(file) if callable(getattr(weighting, "load_state_dict", None)) and file.is_file() else None
    if state is not None and _OF_BLOCKS not in state:
        _load(weighting, state)
    elif state is not None and by_block:
        for block, memory in state[_OF_BLOCKS].items():
            _load(control.of_block(block), memory)
    elif callable(getattr(weighting, "reset", None)):
        logger.warning(
            f"The checkpoint `{checkpoint}` has no memory of past steps for the weighting "
            f"`{type(weighting).__name__}`, which starts over. Give it `state_dict()` and `load_state_dict()` to save "
            "its memory."
        )


def _load(weighting: Any, state: Mapping[str, Any]) -> None:
    if isinstance(weighting, nn.Module):
        _make_buffers(weighting, state)
    weighting.load_state_dict(state)


def _make_buffers(weighting: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Create the buffers that are None until the first step, which torch would not load otherwise."""
    for name, value in state.items():
        owner, _, buffer = name.rpartition(".")
        buffers = weighting.get_submodule(owner)._buffers
        if buffer in buffers and buffers[buffer] is None:
            buffers[buffer] = torch.empty_like(value)

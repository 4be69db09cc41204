"""Checkpoints that survive: which of them are whole, and whether there will be room for the next one."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from hf_jd.gramian.sharding import whole_bytes

STATE_FILE = "trainer_state.json"
"""What Trainer writes last: where it is whole, so is all that was written before."""

_PREFIX = "checkpoint-"
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
    "adapter_model.bin",
    "global_step*/*_model_states.pt",  # DeepSpeed's
)


def what_is_missing(checkpoint: Path, needed: Iterable[str]) -> str | None:
    """What keeps a checkpoint from being resumed, in a few words; None where nothing does.

    Only the ends of the files are looked at: a process that is killed, or a disk that is full, cuts files off.

    Args:
        checkpoint: Its directory.
        needed: Names of files that it must have, or patterns, beside the model's weights and Trainer's state.
    """
    try:
        json.loads((checkpoint / STATE_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return f"it has no {STATE_FILE}"
    except ValueError:
        return f"its {STATE_FILE} is cut off"
    weights = [file for pattern in _WEIGHTS for file in checkpoint.glob(pattern)]
    if not weights:
        return "it has no weights"
    others = {name: list(checkpoint.glob(name)) for name in needed}
    for name, found in others.items():
        if not found:
            return f"it has no {name}"
    for file in chain(weights, *others.values()):
        if not _is_whole(file):
            return f"its {file.name} is not whole"
    return None


def _is_whole(file: Path) -> bool:
    if file.is_dir():  # as FSDP2 writes shards, and last what they are
        return (file / ".metadata").is_file()
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return True
        except (SafetensorError, OSError):
            return False
    if file.suffix == ".json":
        try:
            content = json.loads(file.read_text("utf-8"))
            shards = content["weight_map"].values() if file.name.endswith(".index.json") else []
        except (ValueError, KeyError):
            return False
        return all((file.parent / shard).is_file() for shard in set(shards))
    return zipfile.is_zipfile(file)  # as torch.save writes


def newest_whole(directory: Path, needed: Iterable[str]) -> tuple[Path | None, dict[str, str]]:
    """The newest checkpoint that can be resumed.

    Args:
        directory: The output directory of a run.
        needed: See `what_is_missing`.

    Returns:
        Its directory, None if there is none; and the names of the newer ones, with what they lack.
    """
    found = [path for path in directory.glob(f"{_PREFIX}*") if path.is_dir() and _step(path) is not None]
    skipped: dict[str, str] = {}
    needed = list(needed)
    for checkpoint in sorted(found, key=lambda path: _step(path) or 0, reverse=True):
        missing = what_is_missing(checkpoint, needed)
        if missing is None:
            return checkpoint, skipped
        skipped[checkpoint.name] = missing
    return None, skipped


def _step(checkpoint: Path) -> int | None:
    number = checkpoint.name.removeprefix(_PREFIX)
    return int(number) if number.isdecimal() else None


def check_writable(directory: Path) -> None:
    """Makes the output directory, and a file in it that is removed again.

    Raises:
        ValueError: It can't be written.
    """
    probe = directory / f".jd_probe_{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"The output directory `{directory}` can't be written ({error.strerror or error}): name another one with "
            "--output_dir."
        ) from None


def check_room(directory: Path, model: nn.Module, adapter: bool) -> None:
    """Makes sure, before anything is trained, that a checkpoint will find room.

    Args:
        directory: The output directory.
        model: What is to be saved.
        adapter: Whether only its trainable parameters are.

    Raises:
        ValueError: Its disk has too little room for one checkpoint.
    """
    trainable = sum(whole_bytes(p) for p in model.parameters() if p.requires_grad)
    # Optimizers keep two numbers a parameter, as AdamW, or fewer.
    size = 2 * trainable + (trainable if adapter else sum(whole_bytes(p) for p in model.parameters()))
    free = shutil.disk_usage(directory).free
    if free < size:
        raise ValueError(
            f"The disk of the output directory `{directory}` has {free / 1e9:.3g} GB left, and a checkpoint takes "
            f"about {size / 1e9:.3g} GB: make room, name another one with --output_dir, or set --save_strategy no."
        )

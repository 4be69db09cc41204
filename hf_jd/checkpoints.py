"""Checkpoints: find the newest complete one, and check that there is room for the next."""

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
"""The file that Trainer writes last: if it is complete, so are all others."""

_PREFIX = "checkpoint-"
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
    "adapter_model.bin",
    "global_step*/*_model_states.pt",  # of a backend that writes its own
)


def what_is_missing(checkpoint: Path, needed: Iterable[str]) -> str | None:
    """Say in a few words why a checkpoint can't be resumed; None if it can.

    Check only the ends of files: a killed process, or a full disk, truncates them.

    Args:
        checkpoint: Its directory.
        needed: Names or patterns of files that it must have, besides the model's weights and Trainer's state.
    """
    try:
        json.loads((checkpoint / STATE_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return f"it has no {STATE_FILE}"
    except ValueError:
        return f"its {STATE_FILE} is truncated"
    weights = [file for pattern in _WEIGHTS for file in checkpoint.glob(pattern)]
    if not weights:
        return "it has no weights"
    others = {name: list(checkpoint.glob(name)) for name in needed}
    for name, files in others.items():
        if not files:
            return f"it has no {name}"
    for file in chain(weights, *others.values()):
        if not _is_whole(file):
            return f"its {file.name} is incomplete"
    return None


def _is_whole(file: Path) -> bool:
    if file.is_dir():  # shards, whose metadata is written last
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
    return zipfile.is_zipfile(file)  # the format of torch.save


def newest_whole(directory: Path, needed: Iterable[str]) -> tuple[Path | None, dict[str, str]]:
    """Find the newest checkpoint that can be resumed.

    Args:
        directory: The output directory of a run.
        needed: See `what_is_missing`.

    Returns:
        Its directory, or None; and the names of newer ones, with the reasons why they can't be resumed.
    """
    checkpoints = [path for path in directory.glob(f"{_PREFIX}*") if path.is_dir() and _step(path) is not None]
    skipped: dict[str, str] = {}
    needed = list(needed)
    for checkpoint in sorted(checkpoints, key=lambda path: _step(path) or 0, reverse=True):
        missing = what_is_missing(checkpoint, needed)
        if missing is None:
            return checkpoint, skipped
        skipped[checkpoint.name] = missing
    return None, skipped


def _step(checkpoint: Path) -> int | None:
    number = checkpoint.name.removeprefix(_PREFIX)
    return int(number) if number.isdecimal() else None


def check_writable(directory: Path) -> None:
    """Create the output directory, and write and remove a file in it.

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
            f"The output directory `{directory}` can't be written ({error.strerror or error}): choose another one with "
            "--output_dir."
        ) from None


def check_room(directory: Path, model: nn.Module, adapter: bool) -> None:
    """Check, before training, that the disk has room for a checkpoint.

    Args:
        directory: The output directory.
        model: The model to save.
        adapter: Whether to save only its trainable parameters.

    Raises:
        ValueError: The disk has too little room for one checkpoint.
    """
    trainable = sum(whole_bytes(p) for p in model.parameters() if p.requires_grad)
    # Optimizers store two numbers per parameter, like AdamW, or fewer.
    size = 2 * trainable + (trainable if adapter else sum(whole_bytes(p) for p in model.parameters()))
    free = shutil.disk_usage(directory).free
    if free < size:
        raise ValueError(
            f"The disk of the output directory `{directory}` has {free / 1e9:.3g} GB left, but a checkpoint takes "
            f"about {size / 1e9:.3g} GB: make room, choose another directory with --output_dir, or set "
            "--save_strategy no."
        )

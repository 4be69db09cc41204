"""Trains in forked processes that are killed, resumes them, and prints whether their parameters are bitwise equal.

python tests/trainer/survivor.py DIRECTORY
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers

from hf_jd import JDTrainer
from tests.trainer.runs import arguments, collate, examples, flat, lora

GROUP = {"jd_objectives": "group", "jd_group_column": "task"}
STEPS = 20


def train(directory: Path, kill_in_write: int | None = None) -> None:
    """Train with everything that has a state; may be killed while writing a checkpoint's k-th file."""
    warnings.filterwarnings("ignore")
    if kill_in_write is not None:
        die_writing(kill_in_write)
    flags = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    args = arguments(directory, jd_weighting="gradvac", **flags, **GROUP)
    trainer = JDTrainer(lora("gpt2", dropout=0.1), args, train_dataset=examples(), data_collator=collate)
    trainer.train(resume_from_checkpoint=any(directory.glob("checkpoint-*")))
    torch.save(flat(trainer.model), directory / "parameters.pt")


def die_writing(k: int) -> None:
    """Truncate the k-th file of the third checkpoint in the middle, and kill the process."""
    written = [0]
    save, save_json = torch.save, transformers.TrainerState.save_to_json

    def cut(path: Path | str) -> None:
        written[0] += 1
        if written[0] == k:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def torch_save(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        if "checkpoint-9" in str(path):
            cut(path)

    def state_save(self, path):
        save_json(self, path)
        if "checkpoint-9" in str(path):
            cut(path)

    torch.save, transformers.TrainerState.save_to_json = torch_save, state_save


def run(directory: Path, files: int | None = None, kill_in_write: int | None = None) -> bool:
    """Train in a separate process, which is killed soon after writing some files; return whether it finished."""
    directory.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        with (directory / "log.txt").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                train(directory, kill_in_write)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
    status = wait(child) if files is None else kill_soon(child, directory, files)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def wait(child: int) -> int:
    """Wait for a process; return its exit status."""
    return os.waitpid(child, 0)[1]


def kill_soon(child: int, directory: Path, files: int) -> int:
    """Kill a process at a random moment after it has written some more files; return its exit status."""
    before = count = len(list(directory.rglob("*")))
    while count < before + files:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.001)
        count = len(list(directory.rglob("*")))
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    return wait(child)


def alike(a: Path, b: Path) -> bool:
    """Return whether two runs ended with the same parameters."""
    return torch.equal(torch.load(a / "parameters.pt"), torch.load(b / "parameters.pt"))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    results: dict[str, object] = {"whole": run(root / "whole")}
    files = [random.randint(1, 15) for _ in range(5)]
    results["killed"] = [not run(root / "random", n) for n in files]
    results["random"] = run(root / "random") and alike(root / "random", root / "whole")
    # The order of the third checkpoint's files: arguments, optimizer, scheduler, weighting, random numbers, state.
    for k in range(1, 7):
        name = f"write-{k}"
        killed = not run(root / name, kill_in_write=k)
        results[name] = killed and run(root / name) and alike(root / name, root / "whole")
    print(json.dumps({"files": files, **results}))

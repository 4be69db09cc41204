"""Save the Gramians of short fine-tuning runs on the embedded example, for `benchmark.py weightings --gramians FILE`.

Each run is `hf-jd finetune examples/multitask.yaml` with UPGrad and one objective per example, at one batch size. The
file holds the Gramians [m, m] of each run's steps, in order, by the run's name.

    python scripts/benchmark.py gramians gramians.pt
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hf_jd import JDTrainer
from hf_jd.finetune.data import load_examples
from hf_jd.finetune.example import example_path
from hf_jd.finetune.model import model_path
from hf_jd.finetune.parser import read_settings
from hf_jd.finetune.run import build_trainer, parse


def main(argv: list[str] | None = None) -> int:
    """Fine-tune at each batch size, and write the file.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="benchmark.py gramians", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[8, 32, 64, 128, 256], help="examples per step")
    parser.add_argument("--steps", type=int, default=12, help="steps per run")
    parser.add_argument("--full", action="store_true", help="train all parameters, instead of a LoRA adapter")
    parser.add_argument("--fixed", action="store_true", help="use the same examples in every step, in the same order")
    arguments = parser.parse_args(argv)
    kind = ("full" if arguments.full else "lora") + (", fixed" if arguments.fixed else "")
    by_run = {f"{kind}, m = {m}": gramians(m, arguments) for m in arguments.sizes}
    torch.save(by_run, arguments.file)
    return 0


def gramians(batch: int, arguments: argparse.Namespace) -> list[Tensor]:
    """Fine-tune for some steps of `batch` examples; return each step's Gramian, [batch, batch]."""
    settings = read_settings(example_path("multitask.yaml")) | {
        "per_device_train_batch_size": batch,
        "max_steps": arguments.steps,
        "full": arguments.full,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if arguments.full:
        settings["learning_rate"] = 3e-4
    if arguments.fixed:
        settings["train_sampling_strategy"] = "sequential"
    with tempfile.TemporaryDirectory() as folder:
        model, data, run, training = parse(["--output_dir", folder], settings)
        examples = load_examples(data)
        if arguments.fixed:
            examples["train"] = examples["train"].select(range(batch))
        trainer = build_trainer(model_path(model), model, data, run, training, examples)
        assert isinstance(trainer, JDTrainer)
        recorder = Recorder(trainer.weighting)
        trainer.weighting = recorder
        trainer.train()
    return recorder.gramians


class Recorder:
    """A weighting that stores every Gramian it receives.

    Args:
        weighting: The weighting that computes the weights.
    """

    def __init__(self, weighting: Callable[[Tensor], Tensor]):
        self.weighting = weighting
        self.gramians: list[Tensor] = []

    def __call__(self, gramian: Tensor) -> Tensor:
        """Compute the weights [m] from the Gramian [m, m], and store the Gramian."""
        self.gramians.append(gramian.detach().cpu().clone())
        return self.weighting(gramian)

"""Fine-tunings of the embedded model as `hf-jd finetune` does them, on data in which two tasks compete."""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback

from hf_jd.finetune.model import model_path
from hf_jd.finetune.results import Results
from hf_jd.finetune.run import build_trainer, evaluate_at_the_end, parse
from studies.data import DATA
from studies.npo import NPOTrainer, answers_of

Curve = Sequence[tuple[int, float]]


def train(flags: dict[str, Any], seed: int, output: Path) -> dict[str, Any]:
    """Train one model, and measure both tasks on the way.

    Args:
        flags: Those of `hf-jd finetune`, and: `data`, an entry of `DATA`, and its arguments; `at`, a task and a loss at
            which the other task's is told; `npo`, NPO's beta, for the task `lily`.
        seed: Of the run, and of the choice of examples.
        output: Trainer's folder.
    """
    flags = dict(flags)
    build = DATA[flags.pop("data")]
    examples = build(seed, **{name: flags.pop(name) for name in signature(build).parameters if name in flags})
    at, beta = flags.pop("at", {}), flags.pop("npo", None)
    model, data, run, training = parse([], {**flags, "seed": seed, "output_dir": str(output)})
    kind = None if beta is None else NPOTrainer
    trainer: Any = build_trainer(model_path(model), model, data, run, training, examples, kind)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if beta is not None:
        trainer.beta = beta
    trainer.train()
    evaluate_at_the_end(trainer)
    found = Results.of_log(trainer.state.log_history, training.max_steps)
    way = {task: [(e.step, e.loss) for e in evaluations] for task, evaluations in found.evaluations.items()}
    measures: dict[str, float | None] = {f"loss of {task}": points[-1][1] for task, points in way.items()}
    before: dict[str, float] = {f"loss of {task}": points[0][1] for task, points in way.items()}
    for task, loss in at.items():
        (other,) = set(way) - {task}
        measures[f"{other} where {task} is {loss:g}"] = loss_at(way[task], way[other], loss)
    if beta is not None:
        now, then = answers_of(trainer, examples["validation"])
        measures, before = measures | now, before | then
    return {"measures": measures, "before": before, "way": way}


def loss_at(reached: Curve, told: Curve, loss: float) -> float | None:
    """Return one task's loss at the moment at which another one's first comes to `loss`.

    Between two evaluations, the logarithms of both are taken to be linear in the step. None: it never does.
    """
    for i in range(1, len(reached)):
        before, after = reached[i - 1][1], reached[i][1]
        if before != after and min(before, after) <= loss <= max(before, after):
            share = math.log(loss / before) / math.log(after / before)
            return told[i - 1][1] * (told[i][1] / told[i - 1][1]) ** share
    return None

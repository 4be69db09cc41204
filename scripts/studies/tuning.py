"""Fine-tune the embedded model like `hf-jd finetune`, on data with competing tasks."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback

from hf_jd.finetune.model import model_path
from hf_jd.finetune.results import Results
from hf_jd.finetune.run import build_trainer, evaluate_at_the_end, parse
from studies.data import DATA
from studies.npo import NPOTrainer, answers_of


def train(flags: dict[str, Any], seed: int, output: Path) -> dict[str, Any]:
    """Train one model, and evaluate its tasks along the way.

    Args:
        flags: Flags of `hf-jd finetune`, and: `data`, an entry of `DATA`, and its arguments; `npo`, NPO's beta, for the
            task `lily`.
        seed: The seed of the run and of the choice of examples.
        output: Trainer's folder.
    """
    flags = dict(flags)
    build = DATA[flags.pop("data")]
    examples = build(seed, **{name: flags.pop(name) for name in signature(build).parameters if name in flags})
    beta = flags.pop("npo", None)
    model, data, run, training = parse([], {**flags, "seed": seed, "output_dir": str(output)})
    kind = None if beta is None else NPOTrainer
    trainer: Any = build_trainer(model_path(model), model, data, run, training, examples, kind)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if beta is not None:
        trainer.beta = beta
    trainer.train()
    evaluate_at_the_end(trainer)
    results = Results.of_log(trainer.state.log_history, training.max_steps)
    way = {task: [(e.step, e.loss) for e in evaluations] for task, evaluations in results.evaluations.items()}
    measures: dict[str, float] = {f"loss of {task}": points[-1][1] for task, points in way.items()}
    before: dict[str, float] = {f"loss of {task}": points[0][1] for task, points in way.items()}
    relative = [points[-1][1] / points[0][1] for points in way.values()]
    measures |= {"worst relative loss": max(relative), "mean relative loss": sum(relative) / len(relative)}
    if beta is not None:
        now, then = answers_of(trainer, examples["validation"])
        measures, before = measures | now, before | then
    return {"measures": measures, "before": before, "way": way}

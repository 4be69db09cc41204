"""Run a study of `docs/evidence.md`: every method and control of a plan, on the same seeds.

python scripts/evidence.py examples/evidence/rare.yaml --output_dir runs/rare

Results are one line per run in `results.jsonl`; finished runs are not repeated. `table.md` and `picture.png` summarise
them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from studies.picture import draw
from studies.plan import Plan
from studies.table import add_losses_at, add_tasks_better, table
from transformers.utils import logging


def main(argv: Sequence[str]) -> int:
    """Run what is missing, then write the table and the picture."""
    parser = argparse.ArgumentParser(description="Run a study's plan.")
    parser.add_argument("plan", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, help="the number of seeds, instead of the plan's")
    parser.add_argument("--max_steps", type=int, help="updates per run, instead of the plan's")
    arguments = parser.parse_args(argv)
    plan = Plan.read(arguments.plan, seeds=arguments.seeds, max_steps=arguments.max_steps)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    file = arguments.output_dir / "results.jsonl"
    results = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    done = {_key(result) for result in results}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    train = import_module(f"studies.{plan.study}").train
    for run in plan.runs():
        if _key(run) in done:
            continue
        start = time.perf_counter()
        output = arguments.output_dir / "run"  # Trainer needs a folder; nothing in it is kept.
        results.append(run | train(plan.flags(run), run["seed"], output) | {"seconds": time.perf_counter() - start})
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(results[-1]) + "\n")
        print(f"{_named(run)}: {_described(results[-1]['measures'])}", flush=True)
    results = [result for result in results if _key(result) in {_key(run) for run in plan.runs()}]
    add_losses_at(results, plan.at)
    add_tasks_better(results, plan.control)
    text = table(plan, results)
    (arguments.output_dir / "table.md").write_text(text, "utf-8")
    draw(plan, results, arguments.output_dir / "picture.png")
    print(text)
    return 0


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[part] for part in ("variant", "configuration", "seed", "updates"))


def _named(run: dict[str, Any]) -> str:
    return ", ".join([*filter(None, [run["variant"], run["configuration"]]), f"seed {run['seed']}"])


def _described(measures: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {'never' if value is None else f'{value:.3f}'}" for name, value in measures.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

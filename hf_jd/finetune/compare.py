"""`hf-jd compare`: the same fine-tuning by several configurations, in one table and one picture.

Each run is a process of its own, `hf-jd finetune` with a file of flags, so that none can touch another. transformers'
Trainer doesn't measure conflicts. Where a configuration is stock, a twin is run beside it: JDTrainer with the weighting
`mean` takes the same steps (an invariant that the tests keep), and tells how many of them went against each task.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_jd.finetune.example import example_data, example_path
from hf_jd.finetune.parser import CONFIG_SUFFIXES, read_settings
from hf_jd.finetune.picture import draw
from hf_jd.finetune.processes import Job, run_jobs
from hf_jd.finetune.results import Results
from hf_jd.finetune.run import parse
from hf_jd.finetune.table import comparison_table

DEFAULT = "compare.yaml"
TABLE, RESULTS, PICTURE = "table.md", "results.json", "picture.png"
_TWIN = {"stock": False, "jd_weighting": "mean", "jd_objectives": "instance"}
# A stock run and its twin differ by rounding only; over a run, AdamW makes more of it.
_SAME = 0.05


@dataclass(frozen=True)
class Plan:
    """What is to be compared.

    Attributes:
        base: The flags that all configurations share.
        configurations: Each one's own flags, by its name.
    """

    base: dict[str, Any]
    configurations: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Reads a plan.

        Raises:
            ValueError: The file can't be read, or has other parts than `base` and `configurations`.
        """
        settings = read_settings(path)
        unknown = settings.keys() - {"base", "configurations"}
        base, configurations = settings.get("base") or {}, settings.get("configurations") or {}
        if unknown or not isinstance(base, dict) or not isinstance(configurations, dict) or not configurations:
            raise ValueError(
                f"{path} is no plan of a comparison: it needs `configurations`, each a name with its flags, and may "
                "have `base`, the flags that they share."
            )
        return cls(base, {str(name): dict(flags or {}) for name, flags in configurations.items()})

    def stock(self) -> str | None:
        """The name of the configuration that is transformers' own Trainer."""
        return next((name for name, flags in self.configurations.items() if flags.get("stock")), None)


def main(argv: Sequence[str]) -> int:
    """Runs `hf-jd compare` with these arguments.

    Returns:
        The exit code.
    """
    arguments, flags = _parser().parse_known_args(list(argv))
    if flags and flags[0].endswith(CONFIG_SUFFIXES):
        plan = Plan.read(Path(flags.pop(0)))
    else:
        plan = Plan.read(example_path(DEFAULT))
    folder = Path(arguments.output_dir)
    _make_folder(folder, arguments.overwrite)
    try:
        runs, twins = _run(plan, flags, folder, arguments)
    except ValueError:
        shutil.rmtree(folder)
        raise
    table = comparison_table(runs, twins, plan.stock())
    (folder / TABLE).write_text(table + "\n", "utf-8")
    everything = {name: [asdict(results) for results in seeds] for name, seeds in {**runs, **_named(twins)}.items()}
    plain = {"base": plan.base, "configurations": plan.configurations, "flags": flags, "runs": everything}
    (folder / RESULTS).write_text(json.dumps(plain, indent=1) + "\n", "utf-8")
    print(f"\n{table}\n")
    for note in _notes(runs, twins):
        print(note)
    draw(runs, twins, folder / PICTURE)
    print(f"Saved in {folder}: {TABLE}, {RESULTS}, {PICTURE}, and the runs.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-jd compare",
        usage="%(prog)s [PLAN.yaml] [--flag value ...]",
        description="Run the same fine-tuning by several configurations. Flags of `hf-jd finetune` override them.",
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", default="runs/compare", help="where everything is saved (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="remove what --output_dir holds")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each configuration (default: %(default)s)")
    parser.add_argument(
        "--processes", type=int, default=2, help="runs at a time, one thread each (default: %(default)s)"
    )
    return parser


def _make_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (overwrite and (folder / "runs").is_dir()):
            raise ValueError(
                f"--output_dir {folder} is not empty: name another folder"
                + (", or replace that comparison with --overwrite." if (folder / "runs").is_dir() else ".")
            )
        shutil.rmtree(folder)
    (folder / "runs").mkdir(parents=True)


def _run(
    plan: Plan, flags: list[str], folder: Path, arguments: argparse.Namespace
) -> tuple[dict[str, list[Results]], dict[str, list[Results]]]:
    """Runs everything; returns the configurations' results and those of stock ones' twins, one a seed."""
    shared = {**plan.base, "logging_steps": 1, "time_steps": True, "disable_tqdm": True}
    if not {"train_file", "dataset_name"} & plan.base.keys() and not {"--train_file", "--dataset_name"} & set(flags):
        shared.update(_write_example(folder / "data"))
    configurations = {name: (name, own) for name, own in plan.configurations.items()}
    for name, own in plan.configurations.items():
        if own.get("stock"):
            configurations[f"{name} (twin)"] = (name, {**own, **_TWIN})
    jobs = []
    for seed in range(arguments.seeds):
        for name, (_, own) in configurations.items():
            place = folder / "runs" / f"{_file_name(name)}-{seed}"
            settings = {**shared, **own, "seed": seed, "output_dir": str(place)}
            place.mkdir()
            (place / "flags.json").write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
            parse([str(place / "flags.json"), *flags])  # What is wrong with them is better said now than in an hour.
            command = [sys.executable, "-m", "hf_jd.cli", "finetune", str(place / "flags.json"), *flags]
            jobs.append(Job(f"{name}, seed {seed}", command, place / "log.txt"))
    run_jobs(jobs, arguments.processes, {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})
    found: dict[str, list[Results]] = {}
    for job in jobs:
        found.setdefault(job.name.rpartition(", ")[0], []).append(Results.read(job.log.parent))
    twins = {name: found[key] for key, (name, _) in configurations.items() if key != name}
    return {name: found[name] for name in plan.configurations}, twins


def _named(twins: dict[str, list[Results]]) -> dict[str, list[Results]]:
    return {f"{name} (twin)": seeds for name, seeds in twins.items()}


def _write_example(folder: Path) -> dict[str, str]:
    """Writes the embedded example's data once for all runs, which saves each of them some seconds."""
    folder.mkdir()
    files = {}
    for split, examples in example_data().items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in examples.to_list()), "utf-8")
        files[f"{split}_file"] = str(path)
    return files


def _notes(runs: dict[str, list[Results]], twins: dict[str, list[Results]]) -> list[str]:
    """What a reader of the table has to know of the twins."""
    notes = []
    for name, seeds in twins.items():
        apart = max(
            abs(twin.evaluations[task][-1].loss - ours.evaluations[task][-1].loss)
            for ours, twin in zip(runs[name], seeds, strict=True)
            for task in ours.tasks
        )
        notes.append(
            f"`{name}` measures no conflicts: its steps against a task, and its weights, are those of JDTrainer with "
            f"the weighting `mean`, whose final losses differ by {apart:.4f} at most."
        )
        if apart > _SAME:
            notes.append("That is more than rounding explains: take these two rows with care.")
    return notes


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")

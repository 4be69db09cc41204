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
from hf_jd.finetune.parser import read_settings, split_settings
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


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        configuration: The name of its configuration.
        twin: Whether it only measures what a stock run can't.
        settings: All its flags, by name.
    """

    configuration: str
    twin: bool
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.configuration}{' (twin)' * self.twin}, seed {self.settings['seed']}"

    @property
    def folder(self) -> Path:
        """Where it is saved."""
        return Path(self.settings["output_dir"])


def main(argv: Sequence[str]) -> int:
    """Runs `hf-jd compare` with these arguments.

    Returns:
        The exit code.
    """
    flags, file = split_settings(argv)
    arguments, flags = _parser().parse_known_args(flags)
    plan = Plan.read(example_path(DEFAULT) if file is None else file)
    folder = Path(arguments.output_dir)
    runs = _runs(plan, folder, arguments.seeds)
    for run in runs:  # What is wrong with them is better said now than in an hour.
        _, data, _, _ = parse(flags, run.settings)
        if data.train_file and not data.validation_file:
            raise ValueError("--validation_file is missing: on what is the comparison to be made?")
    example = not (data.train_file or data.dataset_name)
    _make_folder(folder, arguments.overwrite)
    try:
        _run_all(runs, flags, _write_example(folder / "data") if example else {}, arguments.processes)
    except ValueError:
        shutil.rmtree(folder)
        raise
    _report(plan, flags, runs, folder)
    return 0


def _report(plan: Plan, flags: list[str], runs: list[Run], folder: Path) -> None:
    """Prints and saves what the runs measured."""
    found: dict[str, list[Results]] = {name: [] for name in plan.configurations}
    twins: dict[str, list[Results]] = {}
    for run in runs:
        (twins if run.twin else found).setdefault(run.configuration, []).append(Results.read(run.folder))
    table = comparison_table(found, twins, plan.stock())
    (folder / TABLE).write_text(table + "\n", "utf-8")
    everything = {"plan": asdict(plan), "flags": flags}
    for kind, by_name in (("runs", found), ("twins", twins)):
        everything[kind] = {name: [asdict(results) for results in seeds] for name, seeds in by_name.items()}
    (folder / RESULTS).write_text(json.dumps(everything, indent=1) + "\n", "utf-8")
    print("\n".join(["", table, "", *_notes(found, twins)]))
    draw(found, twins, folder / PICTURE)
    print(f"Saved in {folder}: {TABLE}, {RESULTS}, {PICTURE}, and the runs.")


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


def _runs(plan: Plan, folder: Path, seeds: int) -> list[Run]:
    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}; give at least 1.")
    shared = {"eval_on_start": True, **plan.base, "logging_steps": 1, "time_steps": True, "disable_tqdm": True}
    runs = []
    for seed in range(seeds):
        kinds = [(name, False, flags) for name, flags in plan.configurations.items()]
        kinds += [(name, True, {**flags, **_TWIN}) for name, _, flags in kinds if flags.get("stock")]
        for name, twin, flags in kinds:
            place = folder / "runs" / f"{_file_name(name)}{'-twin' * twin}-{seed}"
            runs.append(Run(name, twin, {**shared, **flags, "seed": seed, "output_dir": str(place)}))
    return runs


def _run_all(runs: list[Run], flags: list[str], example: dict[str, str], processes: int) -> None:
    jobs = []
    for run in runs:
        run.folder.mkdir()
        file = run.folder / "flags.json"
        file.write_text(json.dumps({**run.settings, **example}, indent=1) + "\n", "utf-8")
        command = [sys.executable, "-m", "hf_jd.cli", "finetune", str(file), *flags]
        jobs.append(Job(run.name, command, run.folder / "log.txt"))
    run_jobs(jobs, processes, {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})


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

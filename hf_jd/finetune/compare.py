"""`hf-jd compare`: run the same fine-tuning with several configurations, for one table and one picture.

Each run is a separate process, `hf-jd finetune` with a file of flags, so that runs can't affect each other.
transformers' Trainer doesn't measure conflicts, so each stock configuration gets a twin: JDTrainer with the weighting
`mean` takes the same steps (an invariant under test), and measures how many of them went against each task.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hf_jd.finetune.comparison import Plan, Run
from hf_jd.finetune.example import example_data, example_path
from hf_jd.finetune.flags import DataArguments
from hf_jd.finetune.parser import split_settings
from hf_jd.finetune.picture import draw
from hf_jd.finetune.processes import Job, run_jobs
from hf_jd.finetune.run import parse
from hf_jd.finetune.table import comparison_table, last
from hf_jd.finetune.tradeoff import draw_tradeoff, tradeoff_table
from hf_jd.report.history import History, read_history

DEFAULT = "compare.yaml"
TABLE, RESULTS, PICTURE = "table.md", "results.json", "picture.png"
FINISHED = "finished.json"
"""Written to a run's folder when it succeeds: the run's flags."""


def main(argv: Sequence[str]) -> int:
    """Run `hf-jd compare`; return the exit code."""
    flags, file = split_settings(argv)
    arguments, flags = _parser().parse_known_args(flags)
    if any(flag.partition("=")[0] == "--seed" for flag in flags):
        raise ValueError(
            "--seed would give all runs one seed: --seeds N runs each configuration with the seeds 0 to N-1."
        )
    plan = Plan.read(example_path(DEFAULT) if file is None else file)
    folder = Path(arguments.output_dir)
    runs = plan.runs(folder, arguments.seeds)
    example = _check(runs, flags)
    _make_folder(folder, arguments.overwrite, arguments.resume)
    try:
        left = [run for run in runs if not _is_finished(run, flags)]
        if len(left) < len(runs):
            print(f"{len(runs) - len(left)} of {len(runs)} runs are already done.", flush=True)
        if left:
            print(f"{len(left)} to go, {arguments.processes} at a time; logs: {folder}/runs/*/log.txt.", flush=True)
        files = _write_example(example, folder / "data") if example and left else {}
        run_jobs([_job(run, flags, files) for run in left], arguments.processes)
    except ValueError:
        if not any(folder.glob(f"runs/*/{FINISHED}")):
            shutil.rmtree(folder)
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Stopped. To continue, add --resume to the same command.") from None
    _report(plan, flags, runs, folder)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-jd compare",
        usage="%(prog)s [PLAN.yaml] [--flag value ...]",
        description="Run the same fine-tuning with several configurations. Flags of `hf-jd finetune` override them.",
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", default="runs/compare", help="where to save everything (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="remove the comparison in --output_dir first")
    parser.add_argument(
        "--resume", action="store_true", help="keep the finished runs in --output_dir, and run the rest"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs per configuration (default: %(default)s)")
    parser.add_argument(
        "--processes", type=int, default=2, help="runs at a time, one thread each (default: %(default)s)"
    )
    return parser


def _check(runs: Sequence[Run], flags: list[str]) -> str | None:
    """Report errors in later runs now, not in an hour; return the embedded example that they train on, if any."""
    data = DataArguments()
    for run in runs:
        try:
            _, data, _, _ = parse(flags, run.settings)
        except ValueError as error:
            raise ValueError(f"{run.configuration}: {error}") from error
        if data.train_file and not data.validation_file:
            raise ValueError("--validation_file is missing: a comparison needs examples to evaluate on.")
    return None if data.train_file or data.dataset_name else data.example


def _make_folder(folder: Path, overwrite: bool, resume: bool) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        ours = (folder / "runs").is_dir()
        if resume and ours:
            return
        if not (overwrite and ours):
            raise ValueError(
                f"--output_dir {folder} is not empty: choose another folder"
                + (", continue that comparison with --resume, or replace it with --overwrite." if ours else ".")
            )
        shutil.rmtree(folder)
    (folder / "runs").mkdir(parents=True)


def _write_example(name: str, folder: Path) -> dict[str, str]:
    """Write an embedded example's data once for all runs: building it takes seconds."""
    folder.mkdir(exist_ok=True)
    files = {}
    for split, rows in example_data(name).items():
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        files[f"{split}_file"] = str(file)
    return files


def _job(run: Run, flags: list[str], files: Mapping[str, str]) -> Job:
    """Prepare a run's folder."""
    if run.folder.exists():  # left by an interrupted run
        shutil.rmtree(run.folder)
    run.folder.mkdir()
    _write(run.folder / "flags.json", {**run.settings, **files})
    command = (sys.executable, "-m", "hf_jd.cli", "finetune", str(run.folder / "flags.json"), *flags)
    finished = partial(_write, run.folder / FINISHED, _all_flags(run, flags))
    return Job(run.name, command, run.folder / "log.txt", finished)


def _all_flags(run: Run, flags: list[str]) -> dict[str, Any]:
    return {**run.settings, "on the command line": flags}


def _is_finished(run: Run, flags: list[str]) -> bool:
    """Whether a run is already done; raises a ValueError if that was with other flags."""
    try:
        before = json.loads((run.folder / FINISHED).read_text("utf-8"))
    except (OSError, ValueError):  # missing, or only half written
        return False
    wanted = _all_flags(run, flags)
    if different := [name for name in sorted(before.keys() | wanted) if before.get(name) != wanted.get(name)]:
        raise ValueError(
            f"{run.folder} was run with other flags ({', '.join(different)}): use the same flags, choose another "
            "--output_dir, or start over with --overwrite."
        )
    return True


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _report(plan: Plan, flags: list[str], runs: Sequence[Run], folder: Path) -> None:
    """Print and save the results of all runs."""
    measured: dict[str, list[History]] = {name: [] for name in plan.all()}
    twins: dict[str, list[History]] = {}
    for run in runs:
        (twins if run.twin else measured).setdefault(run.configuration, []).append(read_history(run.folder))
    if plan.tradeoff is None:
        table, picture = comparison_table(measured, twins, plan.stock()), partial(draw, measured, twins)
    else:
        table = tradeoff_table(plan, plan.tradeoff, measured)
        picture = partial(draw_tradeoff, plan, plan.tradeoff, measured)
    saved = [TABLE, RESULTS]
    if importlib.util.find_spec("matplotlib") is None:
        print("There is no picture: matplotlib isn't installed (`pip install matplotlib`).")
    else:
        picture(folder / PICTURE)
        saved.append(PICTURE)
    (folder / TABLE).write_text(table + "\n", "utf-8")
    results = {
        kind: {name: [run.by_task() for run in seeds] for name, seeds in of.items()}
        for kind, of in (("runs", measured), ("twins", twins))
    }
    _write(folder / RESULTS, {"plan": asdict(plan), "flags": flags, **results})
    print("\n".join(["", table, "", *_notes(measured, twins)]))
    print(f"Saved in {folder}: {', '.join(saved)}, and the runs.")


def _notes(runs: dict[str, list[History]], twins: dict[str, list[History]]) -> list[str]:
    """Explain the twins to readers of the table."""
    notes = []
    for name, seeds in twins.items():
        apart = max(
            abs(last(twin.evaluations[task]) - last(losses))
            for run, twin in zip(runs[name], seeds, strict=True)
            for task, losses in run.evaluations.items()
        )
        notes.append(
            f"`{name}` measures no conflicts: its weights and its steps against a task come from JDTrainer with the "
            f"weighting `mean`, whose final losses differ by {apart:.4f} at most: treat them with care if that is more "
            "than rounding."
        )
    return notes

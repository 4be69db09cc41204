"""`hf-jd compare`: run the same fine-tuning with several configurations, for one table and one picture.

Each run is a separate process, `hf-jd finetune` with a file of flags, so that runs can't affect each other.
transformers' Trainer doesn't measure conflicts, so each stock configuration gets a twin: JDTrainer with the weighting
`mean` takes the same steps (an invariant under test), and measures how many of them went against each task.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from hf_jd.finetune.comparison import Plan, Run
from hf_jd.finetune.example import example_data, example_path
from hf_jd.finetune.parser import split_settings
from hf_jd.finetune.picture import draw
from hf_jd.finetune.processes import Job, run_jobs
from hf_jd.finetune.results import Results
from hf_jd.finetune.run import parse
from hf_jd.finetune.table import comparison_table
from hf_jd.finetune.tradeoff import draw_tradeoff, tradeoff_table

DEFAULT = "compare.yaml"
TABLE, RESULTS, PICTURE = "table.md", "results.json", "picture.png"
FINISHED = "finished.json"
"""Written to a run's folder when it succeeds: the run's flags."""
# A stock run and its twin differ only by rounding, which AdamW amplifies over a run.
_SAME = 0.05


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
    for run in runs:  # Report errors in later runs now, not in an hour.
        try:
            _, data, _, _ = parse(flags, run.settings)
        except ValueError as error:
            raise ValueError(f"{run.configuration}: {error}") from error
        if data.train_file and not data.validation_file:
            raise ValueError("--validation_file is missing: a comparison needs examples to evaluate on.")
    example = None if data.train_file or data.dataset_name else data.example
    _make_folder(folder, arguments.overwrite, arguments.resume)
    try:
        left = [run for run in runs if not _is_finished(run, flags)]
        if len(left) < len(runs):
            print(f"{len(runs) - len(left)} of {len(runs)} runs are already done.", flush=True)
        if left:
            print(f"{len(left)} to go, {arguments.processes} at a time; logs: {folder}/runs/*/log.txt.", flush=True)
        _run_all(left, flags, _write_example(example, folder / "data") if example else {}, arguments.processes)
    except ValueError:
        if not any(folder.glob(f"runs/*/{FINISHED}")):
            shutil.rmtree(folder)
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Stopped. To continue, add --resume to the same command.") from None
    _report(plan, flags, runs, folder)
    return 0


def _report(plan: Plan, flags: list[str], runs: list[Run], folder: Path) -> None:
    """Print and save the results of all runs."""
    measured: dict[str, list[Results]] = {name: [] for name in plan.all()}
    twins: dict[str, list[Results]] = {}
    for run in runs:
        (twins if run.twin else measured).setdefault(run.configuration, []).append(Results.read(run.folder))
    if plan.tradeoff is None:
        table, picture = comparison_table(measured, twins, plan.stock()), partial(draw, measured, twins)
    else:
        table, picture = tradeoff_table(plan, measured), partial(draw_tradeoff, plan, measured)
    saved = [TABLE, RESULTS]
    if importlib.util.find_spec("matplotlib") is None:
        print("There is no picture: matplotlib isn't installed (`pip install matplotlib`).")
    else:
        picture(folder / PICTURE)
        saved.append(PICTURE)
    (folder / TABLE).write_text(table + "\n", "utf-8")
    everything = {"plan": asdict(plan), "flags": flags}
    for kind, by_name in (("runs", measured), ("twins", twins)):
        everything[kind] = {name: [asdict(results) for results in seeds] for name, seeds in by_name.items()}
    (folder / RESULTS).write_text(json.dumps(everything, indent=1) + "\n", "utf-8")
    print("\n".join(["", table, "", *_notes(measured, twins)]))
    print(f"Saved in {folder}: {', '.join(saved)}, and the runs.")


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


def _is_finished(run: Run, flags: list[str]) -> bool:
    """Whether a run is already done; raises a ValueError if that was with other flags."""
    try:
        before = json.loads((run.folder / FINISHED).read_text("utf-8"))
    except (OSError, ValueError):  # missing, or only half written
        return False
    wanted = {"settings": run.settings, "flags": flags}
    if before == wanted:
        return True
    names = before["settings"].keys() | wanted["settings"].keys()
    different = [name for name in sorted(names) if before["settings"].get(name) != wanted["settings"].get(name)]
    raise ValueError(
        f"{run.folder} was run with other flags ({', '.join(different) or 'on the command line'}): use the same flags, "
        "choose another --output_dir, or start over with --overwrite."
    )


def _run_all(runs: list[Run], flags: list[str], example: dict[str, str], processes: int) -> None:
    by_name = {run.name: run for run in runs}
    jobs = []
    for run in runs:
        if run.folder.exists():  # left by an interrupted run
            shutil.rmtree(run.folder)
        run.folder.mkdir()
        file = run.folder / "flags.json"
        file.write_text(json.dumps({**run.settings, **example}, indent=1) + "\n", "utf-8")
        command = [sys.executable, "-m", "hf_jd.cli", "finetune", str(file), *flags]
        jobs.append(Job(run.name, command, run.folder / "log.txt"))

    def finished(job: Job) -> None:
        run = by_name[job.name]
        (run.folder / FINISHED).write_text(
            json.dumps({"settings": run.settings, "flags": flags}, indent=1) + "\n", "utf-8"
        )

    run_jobs(jobs, processes, {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}, finished)


def _write_example(name: str, folder: Path) -> dict[str, str]:
    """Write an embedded example's data once for all runs, which saves some seconds per run."""
    folder.mkdir(exist_ok=True)
    files = {}
    for split, examples in example_data(name).items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in examples.to_list()), "utf-8")
        files[f"{split}_file"] = str(path)
    return files


def _notes(runs: dict[str, list[Results]], twins: dict[str, list[Results]]) -> list[str]:
    """Explain the twins to readers of the table."""
    notes = []
    for name, seeds in twins.items():
        apart = max(
            abs(twin.evaluations[task][-1].loss - ours.evaluations[task][-1].loss)
            for ours, twin in zip(runs[name], seeds, strict=True)
            for task in ours.tasks
        )
        notes.append(
            f"`{name}` measures no conflicts: its weights and its steps against a task come from JDTrainer with the "
            f"weighting `mean`, whose final losses differ by {apart:.4f} at most."
        )
        if apart > _SAME:
            notes.append("That is more than rounding explains: treat these two rows with care.")
    return notes

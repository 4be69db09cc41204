"""The runs of a study -> a table: means and deviations over seeds, and paired differences from the controls."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hf_jd.finetune.table import markdown, spread
from studies.plan import Plan


def add_losses_at(results: Sequence[dict[str, Any]], at: Mapping[str, float]) -> None:
    """Add to each run's measures one task's loss at the point where the other's first reaches a value.

    Args:
        results: Runs with a `way`.
        at: The value, by the name of the task that reaches it.
    """
    for run in results:
        for task, loss in at.items():
            (other,) = set(run["way"]) - {task}
            measured = loss_at(run["way"][task], run["way"][other], loss)
            run["measures"][f"{other} where {task} is {loss:g}"] = measured


def loss_at(reached: Sequence[Sequence[float]], other: Sequence[Sequence[float]], loss: float) -> float | None:
    """Return the other task's loss at the point where the first one's first reaches `loss`.

    Between evaluations, the logarithms of both are interpolated linearly. None if it never gets there.
    """
    for i in range(1, len(reached)):
        before, after = reached[i - 1][1], reached[i][1]
        if before != after and min(before, after) <= loss <= max(before, after):
            share = math.log(loss / before) / math.log(after / before)
            return other[i - 1][1] * (other[i][1] / other[i - 1][1]) ** share
    return None


def add_tasks_better(results: Sequence[dict[str, Any]], control: str) -> None:
    """Add to each run's measures the number of tasks that end with a lower loss than the control's on the same seed.

    Args:
        results: Runs; runs without a `way` stay unchanged.
        control: The configuration to compare with.
    """
    ends = {(run["variant"], run["configuration"], run["seed"]): _ends(run) for run in results if "way" in run}
    for run in results:
        theirs = ends.get((run["variant"], control, run["seed"]))
        if theirs and run["configuration"] != control:
            better = sum(loss < theirs[task] for task, loss in _ends(run).items())
            run["measures"][f"tasks better than `{control}`"] = better


def _ends(run: dict[str, Any]) -> dict[str, float]:
    return {task: points[-1][1] for task, points in run["way"].items()}


def table(plan: Plan, results: Sequence[dict[str, Any]]) -> str:
    """Format one part per variant, with one row per configuration."""
    header = ["", *plan.shown, f"{plan.measure}, less `{plan.control}`"]
    header += ["less the best of the sweep"] if plan.sweep else []
    rows = []
    for variant in plan.variants:
        of_variant = {name: _of(results, variant, name) for name in plan.configurations}
        best = best_of_sweep(plan, of_variant)
        if variant:
            rows.append([f"**{variant}**", *[""] * (len(header) - 1)])
        before = [run["before"] for run in of_variant[plan.control] if plan.shown.keys() & run.get("before", {}).keys()]
        if before:
            rows.append(["before training", *_before(plan, before), *[""] * (len(header) - 1 - len(plan.shown))])
        for name, seeds in of_variant.items():
            cells = [_shown([run["measures"] for run in seeds], measure, form) for measure, form in plan.shown.items()]
            others = [plan.control, *([best] if plan.sweep else [])]
            cells += [_difference(plan, seeds, of_variant[other]) if other != name else "" for other in others]
            rows.append([f"{name} (best of the sweep)" if name == best else name, *cells])
    return markdown(header, rows) + "\n"


def best_of_sweep(plan: Plan, of_variant: dict[str, list[dict[str, Any]]]) -> str:
    """Return the swept configuration with the best mean, among those that have the measure on the most seeds."""

    def rank(name: str) -> tuple[int, float]:
        values = _values(plan, of_variant[name])
        reached = [value for value in values if value is not None]
        sign = 1 if plan.better == "higher" else -1
        return len(reached), sign * statistics.fmean(reached) if reached else 0.0

    return max(plan.sweep, key=rank) if plan.sweep else ""


def _of(results: Sequence[dict[str, Any]], variant: str, name: str) -> list[dict[str, Any]]:
    runs = [run for run in results if (run["variant"], run["configuration"]) == (variant, name)]
    return sorted(runs, key=lambda run: run["seed"])


def _before(plan: Plan, runs: Sequence[dict[str, float]]) -> list[str]:
    values = {name: [run[name] for run in runs if name in run] for name in plan.shown}
    return [_cell(values[name], form) if values[name] else "" for name, form in plan.shown.items()]


def _values(plan: Plan, seeds: Sequence[dict[str, Any]]) -> list[float | None]:
    return [run["measures"][plan.measure] for run in seeds]


def _shown(seeds: Sequence[Mapping[str, float | None]], measure: str, form: str) -> str:
    """Format a measure, if the runs have it: the control isn't compared with itself."""
    return _cell([run.get(measure) for run in seeds], form) if any(measure in run for run in seeds) else ""


def _cell(values: Sequence[float | None], form: str) -> str:
    reached = [value for value in values if value is not None]
    if not reached:
        return "never"
    few = f" ({len(reached)} of {len(values)})" if len(reached) < len(values) else ""
    return spread(reached, form) + few


def _difference(plan: Plan, seeds: Sequence[dict[str, Any]], control: Sequence[dict[str, Any]]) -> str:
    """Format the mean and deviation of the differences by seed, and on how many seeds the method is better."""
    pairs = zip(_values(plan, seeds), _values(plan, control), strict=True)
    differences = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    if not differences:
        return ""
    sign = 1 if plan.better == "higher" else -1
    wins = sum(sign * difference > 0 for difference in differences)
    form = "+" + plan.shown[plan.measure]
    deviation = f" ± {statistics.stdev(differences):{form[1:]}}" if len(differences) > 1 else ""
    return f"{statistics.fmean(differences):{form}}{deviation}; {wins} of {len(differences)}"

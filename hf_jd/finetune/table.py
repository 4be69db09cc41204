"""Measurements -> one table, in markdown that is aligned for terminals, too."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from hf_jd.report.history import STEP_TIME, History, Series, mean

Runs = Mapping[str, Sequence[History]]
"""The runs of each configuration, one per seed."""


def first(series: Series) -> float:
    """Return the first value."""
    return series[0][1]


def last(series: Series) -> float:
    """Return the last value."""
    return series[-1][1]


def total(series: Series) -> float:
    """Return the sum: of shares of steps, the number of steps if every step was logged."""
    return sum(value for _, value in series)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a markdown table whose columns are as wide as their widest cell; a short row ends in empty cells."""
    lines = [[*row, *[""] * (len(header) - len(row))] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def cell(seeds: Sequence[History], kind: str, task: str, reduce: Callable[[Series], float], form: str) -> str:
    """Format a task's measurement, over seeds.

    Args:
        seeds: The runs of one configuration.
        kind: The attribute of `History` with the measurements of each task.
        task: The task; the cell is empty if it was not measured.
        reduce: Makes one number of a run's measurements.
        form: The number's format.
    """
    return spread([reduce(of[task]) for run in seeds if task in (of := getattr(run, kind))], form)


def spread(values: Iterable[float], form: str) -> str:
    """Format the mean over seeds and, if there are several, the standard deviation; "" for no value."""
    numbers = list(values)
    if not numbers:
        return ""
    mean = format(statistics.fmean(numbers), form)
    if len(numbers) == 1 or not all(map(math.isfinite, numbers)):  # A run that diverged has no deviation.
        return mean
    return f"{mean} ± {format(statistics.stdev(numbers), form)}"


def evaluation_table(run: History) -> str:
    """Format one run's tasks: loss and accuracy before (if evaluated) and after."""
    before = any(series[0][0] == 0 and len(series) > 1 for series in run.evaluations.values())
    times = {" before": first, " after": last} if before else {" after" if run.steps else "": last}
    columns = {f"loss{when}": ("evaluations", reduce, ".3f") for when, reduce in times.items()}
    columns |= {f"accuracy{when}": ("accuracies", reduce, ".1%") for when, reduce in times.items()}
    if run.weights:
        columns |= {"share of the weights": ("weights", mean, ".1%"), "steps against it": ("against", mean, ".0%")}
    rows = [
        [task, *(cell([run], kind, task, reduce, form) for kind, reduce, form in columns.values())]
        for task in run.tasks
    ]
    return markdown(["task", *columns], rows)


def comparison_table(runs: Runs, twins: Runs, stock: str | None) -> str:
    """Format the table of `hf-jd compare`.

    Args:
        runs: The runs of each configuration.
        twins: Runs with the same steps as a configuration in `runs` that can't measure conflicts.
        stock: The configuration to compare the others' times with, if any.

    Raises:
        ValueError: Nothing was evaluated.
    """
    start = next(iter(runs.values()))[0]
    if not start.tasks:
        raise ValueError("Nothing was evaluated: the data has no examples to evaluate on.")
    before = {"before training": [start]} if all(series[0][0] == 0 for series in start.evaluations.values()) else {}

    def block(runs: Runs, kind: str, reduce: Callable[[Series], float], form: str) -> list[list[str]]:
        rows = [[name, *(cell(of, kind, task, reduce, form) for task in start.tasks)] for name, of in runs.items()]
        return [row for row in rows if any(row[1:])]

    losses = block(runs, "evaluations", last, ".2f")
    for row, seeds in zip(losses, runs.values(), strict=True):
        row.append(_time(seeds, runs.get(stock or "", ())))
    watched = {**runs, **twins}
    sections = {
        "validation loss": block(before, "evaluations", first, ".2f") + losses,
        "accuracy": block(before, "accuracies", first, ".1%")
        + block({"always the most frequent token": [start]}, "majorities", first, ".1%")
        + block(runs, "accuracies", last, ".1%"),
        f"steps against the task, of {start.steps}": block(watched, "against", total, ".0f"),
        "share of the weights": block(watched, "weights", mean, ".1%"),
    }
    rows = [row for title, lines in sections.items() if lines for row in ([f"**{title}**"], *lines)]
    return markdown(["", *start.tasks, "time per step"], rows)


def _time(seeds: Sequence[History], stock: Sequence[History]) -> str:
    """Format the median step time, in seconds and as a ratio to stock's."""
    ours, theirs = (
        [statistics.median(seconds for _, seconds in run.totals[STEP_TIME]) for run in of if STEP_TIME in run.totals]
        for of in (seeds, stock)
    )
    if not ours:
        return ""
    seconds = statistics.median(ours)
    return f"{seconds:.2f} s" + (f", x {seconds / statistics.median(theirs):.2f}" if theirs else "")

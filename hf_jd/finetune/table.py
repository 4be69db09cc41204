"""Measurements -> one table, in markdown that is aligned for terminals, too."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from hf_jd.finetune.results import Results

_NONE = ""
_Cell = Callable[[Results, str], float | None]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a markdown table whose columns are as wide as their widest cell; a short row ends in empty cells."""
    lines = [[*row, *[_NONE] * (len(header) - len(row))] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    texts = []
    for line in [lines[0], rule, *lines[1:]]:
        others = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        texts.append(f"| {' | '.join([line[0].ljust(widths[0]), *others])} |")
    return "\n".join(texts)


def evaluation_table(results: Results) -> str:
    """Format one run's tasks: loss and accuracy before (if evaluated) and after."""
    before = any(evaluations[0].step == 0 and len(evaluations) > 1 for evaluations in results.evaluations.values())
    rows = []
    for task in results.tasks:
        shown = [results.evaluations[task][i] for i in ((0, -1) if before else (-1,))]
        row = [task, *(f"{e.loss:.3f}" for e in shown), *(f"{e.accuracy:.1%}" for e in shown)]
        if results.weights:
            row += [spread([results.mean_weight(task)], ".1%"), spread([results.share_against(task)], ".0%")]
        rows.append(row)
    times = [" before", " after"] if before else [" after" if results.steps else ""]
    header = ["task", *(f"loss{when}" for when in times), *(f"accuracy{when}" for when in times)]
    return markdown([*header, *(["share of the weights", "steps against it"] if results.weights else [])], rows)


def comparison_table(
    runs: Mapping[str, Sequence[Results]], twins: Mapping[str, Sequence[Results]], stock: str | None
) -> str:
    """Format the table of `hf-jd compare`.

    Args:
        runs: The runs of each configuration, one per seed.
        twins: Runs with the same steps as a configuration in `runs` that can't measure conflicts.
        stock: The configuration to compare the others' times with, if any.

    Raises:
        ValueError: Nothing was evaluated.
    """
    first = next(iter(runs.values()))[0]
    tasks = first.tasks
    if not tasks:
        raise ValueError("Nothing was evaluated: the data has no examples to evaluate on.")
    start = [first.evaluations[task][0] for task in tasks]
    from_start = all(evaluation.step == 0 for evaluation in start)
    watched = {**runs, **twins}
    loss = _block(runs, tasks, lambda r, task: r.evaluations[task][-1].loss, ".2f")
    for row, seeds in zip(loss, runs.values(), strict=True):
        row.append(_time(seeds, runs.get(stock or "", ())))
    accuracy = _block(runs, tasks, lambda r, task: r.evaluations[task][-1].accuracy, ".1%")
    sections = {
        "validation loss": [["before training", *(f"{e.loss:.2f}" for e in start)]] * from_start + loss,
        "accuracy": [
            *[["before training", *(f"{e.accuracy:.1%}" for e in start)]] * from_start,
            ["always the most frequent token", *(f"{e.majority:.1%}" for e in start)],
            *accuracy,
        ],
        f"steps against the task, of {first.steps}": _block(watched, tasks, Results.steps_against, ".0f"),
        "share of the weights": _block(watched, tasks, Results.mean_weight, ".1%"),
    }
    header = ["", *tasks, "time per step"]
    rows = [row for title, lines in sections.items() if lines for row in ([f"**{title}**"], *lines)]
    return markdown(header, rows)


def _block(runs: Mapping[str, Sequence[Results]], tasks: Sequence[str], cell: _Cell, form: str) -> list[list[str]]:
    """Build a row per configuration with this measurement, with a cell per task."""
    rows = [
        [name, *(spread([cell(results, task) for results in seeds], form) for task in tasks)]
        for name, seeds in runs.items()
    ]
    return [row for row in rows if any(row[1:])]


def _time(seeds: Sequence[Results], stock: Sequence[Results]) -> str:
    """Format the median step time, in seconds and as a ratio to stock's."""
    ours = [results.step_time for results in seeds if results.step_time is not None]
    theirs = [results.step_time for results in stock if results.step_time is not None]
    if not ours:
        return _NONE
    seconds = statistics.median(ours)
    return f"{seconds:.2f} s" + (f", x {seconds / statistics.median(theirs):.2f}" if theirs else "")


def spread(values: Sequence[float | None], form: str) -> str:
    """Format the mean over seeds and, if there are several, the standard deviation."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return _NONE
    mean = format(statistics.fmean(numbers), form)
    if len(numbers) == 1 or not all(map(math.isfinite, numbers)):  # A run that diverged has no deviation.
        return mean
    return f"{mean} ± {format(statistics.stdev(numbers), form)}"

"""Measurements -> one picture: each task's loss, and the shares of the weights, over the steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_jd.finetune.table import Runs
from hf_jd.report.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#8dd3c7", "#ffd92f", "#fb8072", "#80b1d3", "#bebada", "#b3de69", "#fccde5", "#d9d9d9")
"""The tasks' colours, different from those of the configurations' lines."""
_WINDOW = 8
"""Steps over which to average shares, which jump from batch to batch."""


def draw(runs: Runs, twins: Runs, path: Path) -> None:
    """Draw the curves of all configurations, as means over seeds, into a PNG.

    Args:
        runs: The runs of each configuration.
        twins: Runs with the same steps as a configuration in `runs` that can't measure conflicts.
        path: The PNG.
    """
    from matplotlib.figure import Figure

    tasks = next(iter(runs.values()))[0].tasks
    weighted = {name: seeds for name in runs if (seeds := twins.get(name, runs[name]))[0].weights}
    rows, columns = 1 + bool(weighted), max(len(tasks), len(weighted))
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=False):
        _draw_losses(axis, task, runs)
    for axis, (name, seeds) in zip(axes[-1], weighted.items(), strict=False):
        _draw_weights(axis, name, seeds, tasks)
    for axis in axes.flat:
        axis.set_visible(axis.has_data())
    axes[0][0].set_ylabel("validation loss")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    if weighted:
        axes[-1][0].set_ylabel("share of the weights")
        figure.legend(*axes[-1][0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(path, dpi=130)


def _draw_losses(axis: Axes, task: str, runs: Runs) -> None:
    for name, seeds in runs.items():
        steps = [step for step, _ in seeds[0].evaluations[task]]
        curves = list(zip(*([loss for _, loss in run.evaluations[task]] for run in seeds), strict=True))
        axis.plot(steps, list(map(statistics.fmean, curves)), marker=".", label=name)
        if len(seeds) > 1:
            axis.fill_between(steps, list(map(min, curves)), list(map(max, curves)), alpha=0.2)
    axis.set(title=task, xlabel="step")
    axis.locator_params(axis="x", integer=True)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_weights(axis: Axes, name: str, seeds: Sequence[History], tasks: Sequence[str]) -> None:
    steps = range(1, seeds[0].steps + 1)
    shares = []
    for task in tasks:
        # A task that is absent from a step has weight 0 there.
        series = [dict(run.weights.get(task, [])) for run in seeds]
        by_step = [statistics.fmean(of_seed.get(step, 0.0) for of_seed in series) for step in steps]
        shares.append([statistics.fmean(by_step[max(0, i - _WINDOW + 1) : i + 1]) for i in range(len(by_step))])
    axis.stackplot(list(steps), shares, labels=list(tasks), alpha=0.8, colors=_COLORS)
    axis.set(xlabel="step", ylim=(0, 1), xmargin=0)
    axis.locator_params(axis="x", integer=True)
    axis.set_title(name, fontsize="medium")

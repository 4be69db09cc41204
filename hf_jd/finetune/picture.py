"""Measurements -> one picture: each task's loss, and the shares of the weights, over the steps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_jd.finetune.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#8dd3c7", "#ffd92f", "#fb8072", "#80b1d3", "#bebada", "#b3de69", "#fccde5", "#d9d9d9")
"""The tasks' colours, different from those of the configurations' lines."""
_WINDOW = 8
"""Steps over which to average shares, which jump from batch to batch."""


def draw(runs: Mapping[str, Sequence[Results]], twins: Mapping[str, Sequence[Results]], path: Path) -> None:
    """Draws the curves of all configurations, as means over seeds, into a PNG.

    Args:
        runs: The runs of each configuration, one per seed.
        twins: Runs with the same steps as a configuration in `runs` that can't measure conflicts.
        path: The PNG.
    """
    from matplotlib.figure import Figure

    tasks = next(iter(runs.values()))[0].tasks
    weighted = {name: twins.get(name, seeds) for name, seeds in runs.items()}
    weighted = {name: seeds for name, seeds in weighted.items() if seeds[0].weights}
    columns = max(len(tasks), len(weighted))
    figure = Figure(figsize=(3.2 * columns, 3.4 * (2 if weighted else 1)), layout="constrained")
    axes = figure.subplots(2 if weighted else 1, columns, squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=False):
        _draw_losses(axis, task, runs)
    for axis, (name, seeds) in zip(axes[-1], weighted.items(), strict=False):
        _draw_weights(axis, name, seeds, tasks)
    for row, used in zip(axes, (len(tasks), len(weighted)), strict=False):
        for axis in row[used:]:
            axis.set_visible(False)
    axes[0][0].set_ylabel("validation loss")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    if weighted:
        axes[-1][0].set_ylabel("share of the weights")
        figure.legend(*axes[-1][0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(path, dpi=130)


def _draw_losses(axis: Axes, task: str, runs: Mapping[str, Sequence[Results]]) -> None:
    for name, seeds in runs.items():
        steps = [evaluation.step for evaluation in seeds[0].evaluations[task]]
        curves = [[evaluation.loss for evaluation in results.evaluations[task]] for results in seeds]
        axis.plot(steps, [statistics.fmean(at) for at in zip(*curves, strict=True)], marker=".", label=name)
        if len(curves) > 1:
            low, high = ([pick(at) for at in zip(*curves, strict=True)] for pick in (min, max))
            axis.fill_between(steps, low, high, alpha=0.2)
    axis.set_title(task)
    axis.set_xlabel("step")
    axis.locator_params(axis="x", integer=True)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_weights(axis: Axes, name: str, seeds: Sequence[Results], tasks: Sequence[str]) -> None:
    steps = range(1, seeds[0].steps + 1)
    shares = []
    for task in tasks:
        # A task that is absent from a step has weight 0 there.
        series = [dict(results.weights.get(task, [])) for results in seeds]
        by_step = [statistics.fmean(of_seed.get(step, 0.0) for of_seed in series) for step in steps]
        shares.append([statistics.fmean(by_step[max(0, i - _WINDOW + 1) : i + 1]) for i in range(len(by_step))])
    axis.stackplot(list(steps), shares, labels=list(tasks), alpha=0.8, colors=_COLORS)
    axis.set_title(name, fontsize="medium")
    axis.set_xlabel("step")
    axis.locator_params(axis="x", integer=True)
    axis.set_ylim(0, 1)
    axis.margins(x=0)

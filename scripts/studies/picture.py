"""The runs of a study -> a picture: each seed's measure, curves of two losses, or methods in the plane."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "s^Dv<>"
"""Colour of the control and of configurations chosen by hand."""


def draw(plan: Plan, results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a PNG with one panel per variant; the control and configurations chosen by hand are grey."""
    from matplotlib.figure import Figure

    names = list(plan.configurations)
    greys = [name for name in names if name in {plan.control, *plan.sweep}]
    hues = [name for name in names if name not in greys]
    colors = {name: str(0.8 * i / max(1, len(greys))) for i, name in enumerate(greys)}
    colors |= {name: f"C{i % 10}" for i, name in enumerate(hues)}
    plane = bool(plan.axes or plan.front)
    panel = (4.2, 4.4) if plane else (3.2, 0.36 * len(names) + 1.2)
    count = len(plan.variants)
    titles = plan.front or [f"loss of `{task}`" for task in plan.axes] or [f"{plan.measure} ({plan.better} is better)"]
    figure = Figure(figsize=(panel[0] * count + 2.2, panel[1]), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False, sharey=True, sharex=plane)[0]
    for axis, variant in zip(axes, plan.variants, strict=True):
        if plan.front:
            _line(axis, [_of(results, variant, name) for name in plan.sweep], plan.front)
        for row, name in enumerate(names):
            seeds = _of(results, variant, name)
            style = f"--{_MARKERS[greys.index(name) % len(_MARKERS)]}" if name in greys else "-o"
            if plan.front:
                _point(axis, name, seeds, plan.front, colors[name], style[-1])
            elif plan.axes:
                _way(axis, name, seeds, plan.axes, colors[name], style)
            else:
                values = [run["measures"][plan.measure] for run in seeds]
                _dots(axis, row, [value for value in values if value is not None], colors[name])
        axis.set_title(variant, fontsize="medium")
        axis.set_xlabel(titles[0])
        axis.spines[["top", "right"]].set_visible(False)
    if plane:
        axes[0].set_ylabel(titles[1])
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    else:
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def _of(results: Sequence[dict[str, Any]], variant: str, name: str) -> list[dict[str, Any]]:
    return [run for run in results if (run["variant"], run["configuration"]) == (variant, name)]


def _line(axis: Axes, swept: Sequence[Sequence[dict[str, Any]]], measures: Sequence[str]) -> None:
    """Connect the means of the sweep, in its order."""
    points = [_mean(seeds, measures) for seeds in swept if seeds]
    axis.plot(*zip(*points, strict=True), "--", color="0.6", linewidth=1)


def _point(
    axis: Axes, name: str, seeds: Sequence[dict[str, Any]], measures: Sequence[str], color: str, marker: str
) -> None:
    """Draw the mean of two measures over seeds, and each seed, faintly."""
    if seeds:
        x, y = ([run["measures"][measure] for run in seeds] for measure in measures)
        axis.plot(x, y, marker, color=color, markersize=4, alpha=0.3)
        axis.plot(*([value] for value in _mean(seeds, measures)), marker, color=color, markersize=8, label=name)


def _mean(seeds: Sequence[dict[str, Any]], measures: Sequence[str]) -> tuple[float, ...]:
    return tuple(statistics.fmean(run["measures"][measure] for run in seeds) for measure in measures)


def _dots(axis: Axes, row: int, values: Sequence[float], color: str) -> None:
    axis.plot(values, [row] * len(values), "o", color=color, markersize=4, alpha=0.6)
    if values:
        axis.plot([statistics.fmean(values)], [row], "|", color=color, markersize=16, markeredgewidth=2.5)


def _way(axis: Axes, name: str, seeds: Sequence[dict[str, Any]], tasks: Sequence[str], color: str, style: str) -> None:
    """Draw the mean of both losses over seeds at each evaluation; a dot marks the end."""
    ways = [[[loss for _, loss in run["way"][task]] for task in tasks] for run in seeds]
    if ways:
        x, y = ([statistics.fmean(at) for at in zip(*(way[i] for way in ways), strict=True)] for i in (0, 1))
        axis.plot(x, y, style, color=color, markevery=[-1], markersize=5, linewidth=1.5, label=name)

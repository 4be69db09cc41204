"""The runs of a study -> a picture: each seed's measure, or the ways that methods take through two losses."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studies.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "s^Dv<>"
"""Of what is chosen by hand, and of the control."""


def draw(plan: Plan, results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a panel per variant into a PNG; what is chosen by hand, and the control, are grey."""
    from matplotlib.figure import Figure

    names = list(plan.configurations)
    greys = [name for name in names if name in {plan.control, *plan.sweep}]
    hues = [name for name in names if name not in greys]
    colors = {name: str(0.8 * i / max(1, len(greys))) for i, name in enumerate(greys)}
    colors |= {name: f"C{i % 10}" for i, name in enumerate(hues)}
    panel = (4.2, 4.4) if plan.axes else (3.2, 0.36 * len(names) + 1.2)
    count = len(plan.variants)
    figure = Figure(figsize=(panel[0] * count + 2.2, panel[1]), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False, sharey=True, sharex=bool(plan.axes))[0]
    for axis, variant in zip(axes, plan.variants, strict=True):
        for row, name in enumerate(names):
            seeds = [run for run in results if (run["variant"], run["configuration"]) == (variant, name)]
            if plan.axes:
                _way(
                    axis,
                    name,
                    seeds,
                    plan.axes,
                    colors[name],
                    f"--{_MARKERS[greys.index(name)]}" if name in greys else "-o",
                )
            else:
                values = [run["measures"][plan.measure] for run in seeds]
                _dots(axis, row, [value for value in values if value is not None], colors[name])
        axis.set_title(variant, fontsize="medium")
        axis.set_xlabel(f"loss of `{plan.axes[0]}`" if plan.axes else f"{plan.measure} ({plan.better} is better)")
        axis.spines[["top", "right"]].set_visible(False)
    if plan.axes:
        axes[0].set_ylabel(f"loss of `{plan.axes[1]}`")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    else:
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def _dots(axis: Axes, row: int, values: Sequence[float], color: str) -> None:
    axis.plot(values, [row] * len(values), "o", color=color, markersize=4, alpha=0.6)
    if values:
        axis.plot([statistics.fmean(values)], [row], "|", color=color, markersize=16, markeredgewidth=2.5)


def _way(axis: Axes, name: str, seeds: Sequence[dict[str, Any]], tasks: Sequence[str], color: str, style: str) -> None:
    """Mean over seeds of both losses at each evaluation; a dot marks the end."""
    ways = [[[loss for _, loss in run["way"][task]] for task in tasks] for run in seeds]
    if ways:
        x, y = ([statistics.fmean(at) for at in zip(*(way[i] for way in ways), strict=True)] for i in (0, 1))
        axis.plot(x, y, style, color=color, markevery=[-1], markersize=5, linewidth=1.5, label=name)

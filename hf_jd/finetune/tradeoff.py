"""Runs that trade one task for another -> a table of prices, and a picture of their paths."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_jd.finetune.comparison import Plan, Tradeoff
from hf_jd.finetune.table import Runs, cell, first, last, markdown, spread, total
from hf_jd.report.history import History
from hf_jd.report.verdict import CONTROLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SMALLEST = 1e-9
"""Replaces a loss of 0, which has no logarithm."""


def losses_of(run: History, tradeoff: Tradeoff) -> list[tuple[int, float, float]]:
    """Return the step, the loss to raise and the loss to keep low, at each evaluation of a run."""
    both = zip(run.evaluations[tradeoff.forget], run.evaluations[tradeoff.keep], strict=True)
    return [(step, max(forget, _SMALLEST), max(keep, _SMALLEST)) for (step, forget), (_, keep) in both]


def price(run: History, tradeoff: Tradeoff) -> tuple[float, float] | None:
    """Return the step at which everything is forgotten, and the loss to keep low at that step.

    The logarithms of both losses are interpolated linearly between evaluations.

    Returns:
        None if the run doesn't get that far.
    """
    points = losses_of(run, tradeoff)
    for (step, low, loss), (later, high, then) in zip(points, points[1:], strict=False):
        if low < tradeoff.until <= high:
            share = math.log(tradeoff.until / low) / math.log(high / low)
            return step + share * (later - step), loss * (then / loss) ** share
    return None


def tradeoff_table(plan: Plan, tradeoff: Tradeoff, runs: Runs) -> str:
    """Format the table of a plan with a trade-off: a section per variant, a row per configuration.

    It shows both final losses and accuracies, the price (see `price`), and the number of steps against each task.

    Raises:
        ValueError: One of the two tasks wasn't evaluated.
    """
    forget, keep = tradeoff.forget, tradeoff.keep
    start = next(iter(runs.values()))[0]
    for task in (forget, keep):
        if task not in start.tasks:
            raise ValueError(
                f"The plan's tradeoff has the task `{task}`; the evaluated tasks are {', '.join(start.tasks)}."
            )
    header = ["", f"{forget} ↑", "right", f"{keep} ↓", "right"]
    header += [f"{keep} where {forget} is {tradeoff.until:g}", "at step", f"steps against {forget}", f"against {keep}"]
    rows = [["before training", *_losses([start], tradeoff, first)]]
    for variant in plan.variants:
        rows += [[f"**{variant}**"]] if variant else []
        for name, full in plan.names(variant).items():
            against = [cell(runs[full], "against", task, total, ".0f") for task in (forget, keep)]
            rows.append([name, *_losses(runs[full], tradeoff, last), *_prices(runs[full], tradeoff), *against])
    return markdown(header, rows)


def _losses(seeds: Sequence[History], tradeoff: Tradeoff, reduce: Any) -> list[str]:
    kinds = {"evaluations": ".2f", "accuracies": ".0%"}
    tasks = (tradeoff.forget, tradeoff.keep)
    return [cell(seeds, kind, task, reduce, form) for task in tasks for kind, form in kinds.items()]


def _prices(seeds: Sequence[History], tradeoff: Tradeoff) -> list[str]:
    prices = [cost for run in seeds if (cost := price(run, tradeoff))]
    if not prices:
        return ["never", ""]
    few = f" ({len(prices)} of {len(seeds)})" if len(prices) < len(seeds) else ""
    return [spread([loss for _, loss in prices], ".2f") + few, spread([step for step, _ in prices], ".0f")]


def draw_tradeoff(plan: Plan, tradeoff: Tradeoff, runs: Runs, path: Path) -> None:
    """Draw each configuration's path through the two losses into a PNG; controls are grey."""
    from matplotlib.figure import Figure

    flags = {name: plan.base | flags for name, flags in plan.configurations.items()}
    controls = [name for name, of in flags.items() if of.get("stock") or of.get("jd_weighting") in CONTROLS]
    others = [name for name in flags if name not in controls]
    styles = {name: (str(0.7 * i / len(controls)), "--s") for i, name in enumerate(controls)}
    styles |= {name: (f"C{(3, 0, 2, 1, 4, 9, 5, 6, 8)[i % 9]}", "-o") for i, name in enumerate(others)}
    figure = Figure(figsize=(6.2 * len(plan.variants) + 1.6, 5.6), layout="constrained")
    axes = figure.subplots(1, len(plan.variants), squeeze=False, sharex=True, sharey=True)[0]
    for axis, variant in zip(axes, plan.variants, strict=True):
        for name, full in plan.names(variant).items():
            _draw_path(axis, name, [losses_of(run, tradeoff) for run in runs[full]], *styles[name])
        _, before, loss = losses_of(next(iter(runs.values()))[0], tradeoff)[0]
        axis.plot(loss, before, "*", color="black", markersize=14, label="before training")
        axis.axhline(tradeoff.until, color="black", linewidth=0.8, linestyle=":", label="above: all is forgotten")
        axis.set(title=variant, xlabel=f"loss of `{tradeoff.keep}`, to be kept low", xscale="log", yscale="log")
        _label_decades(axis)
    axes[0].set_ylabel(f"loss of `{tradeoff.forget}`, to be raised")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=130)


def _draw_path(axis: Axes, name: str, paths: Sequence[list[tuple[int, float, float]]], color: str, style: str) -> None:
    """Draw one configuration: the geometric mean over seeds, and each seed's end."""
    keep, forget = (
        [statistics.geometric_mean(at[i] for at in points) for points in zip(*paths, strict=True)] for i in (2, 1)
    )
    axis.plot(keep, forget, style, color=color, linewidth=1.6, markersize=5, markevery=[-1], label=name)
    for _, end_forget, end_keep in [points[-1] for points in paths if len(paths) > 1]:
        axis.plot(end_keep, end_forget, style[-1], color=color, markersize=3)


def _label_decades(axis: Axes) -> None:
    """Label 1, 2 and 5 times each power of ten: ranges are narrow."""
    from matplotlib.ticker import LogLocator, NullLocator

    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter("{x:g}")
        side.set_minor_locator(NullLocator())
    axis.spines[["top", "right"]].set_visible(False)

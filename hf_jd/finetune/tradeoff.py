"""Runs that trade one task for another -> a table of prices, and a picture of their paths."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_jd.finetune.comparison import Plan, Tradeoff
from hf_jd.finetune.results import Results
from hf_jd.finetune.table import markdown, spread
from hf_jd.report.verdict import CONTROLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = [f"C{i}" for i in (3, 0, 2, 1, 4, 9, 5, 6, 8)]
"""The other weightings' colours; controls are grey."""
_SMALLEST = 1e-9
"""Replaces a loss of 0, which has no logarithm."""


def losses_of(results: Results, tradeoff: Tradeoff) -> list[tuple[int, float, float]]:
    """Return the step, the loss to raise and the loss to keep low, at each evaluation of a run."""
    forget, keep = results.evaluations[tradeoff.forget], results.evaluations[tradeoff.keep]
    return [(a.step, max(a.loss, _SMALLEST), max(b.loss, _SMALLEST)) for a, b in zip(forget, keep, strict=True)]


def price(results: Results, tradeoff: Tradeoff) -> tuple[float, float] | None:
    """Return the step at which everything is forgotten, and the loss to keep low at that step.

    The logarithms of both losses are interpolated linearly between evaluations.

    Returns:
        None if the run doesn't get that far.
    """
    points = losses_of(results, tradeoff)
    for (step, low, loss), (later, high, then) in zip(points, points[1:], strict=False):
        if low < tradeoff.until <= high:
            share = math.log(tradeoff.until / low) / math.log(high / low)
            return step + share * (later - step), loss * (then / loss) ** share
    return None


def tradeoff_table(plan: Plan, runs: Mapping[str, Sequence[Results]]) -> str:
    """Format the table of a plan with a trade-off: a section per variant, a row per configuration.

    It shows both final losses and accuracies, the price (see `price`), and the number of steps against each task.

    Args:
        plan: Its `tradeoff` is not None.
        runs: The runs of each configuration, one per seed.

    Raises:
        ValueError: One of the two tasks wasn't evaluated.
    """
    tradeoff = _checked(plan, runs)
    forget, keep = tradeoff.forget, tradeoff.keep
    header = ["", f"{forget} ↑", "right", f"{keep} ↓", "right"]
    header += [f"{keep} where {forget} is {tradeoff.until:g}", "at step", f"steps against {forget}", f"against {keep}"]
    start = [next(iter(runs.values()))[0].evaluations[task][0] for task in (forget, keep)]
    rows = [["before training", *(text for e in start for text in (f"{e.loss:.2f}", f"{e.accuracy:.0%}"))]]
    for variant in plan.variants:
        rows += [[f"**{variant}**"]] if variant else []
        rows += [_row(name, runs[full], tradeoff) for name, full in plan.names(variant).items()]
    return markdown(header, rows)


def _checked(plan: Plan, runs: Mapping[str, Sequence[Results]]) -> Tradeoff:
    assert plan.tradeoff is not None
    tasks = next(iter(runs.values()))[0].tasks
    for task in (plan.tradeoff.forget, plan.tradeoff.keep):
        if task not in tasks:
            raise ValueError(f"The plan's tradeoff has the task `{task}`; the evaluated tasks are {', '.join(tasks)}.")
    return plan.tradeoff


def _row(name: str, seeds: Sequence[Results], tradeoff: Tradeoff) -> list[str]:
    cells, against = [name], []
    for task in (tradeoff.forget, tradeoff.keep):
        ends = [results.evaluations[task][-1] for results in seeds]
        cells += [spread([end.loss for end in ends], ".2f"), spread([end.accuracy for end in ends], ".0%")]
        against.append(spread([results.steps_against(task) for results in seeds], ".0f"))
    prices = [cost for results in seeds if (cost := price(results, tradeoff))]
    few = f" ({len(prices)} of {len(seeds)})" if len(prices) < len(seeds) else ""
    cells.append(spread([loss for _, loss in prices], ".2f") + few if prices else "never")
    return [*cells, spread([step for step, _ in prices], ".0f"), *against]


def draw_tradeoff(plan: Plan, runs: Mapping[str, Sequence[Results]], path: Path) -> None:
    """Draws each configuration's path through the two losses into a PNG.

    Args:
        plan: Its `tradeoff` is not None.
        runs: The runs of each configuration, one per seed.
        path: The PNG.
    """
    from matplotlib.figure import Figure

    tradeoff = _checked(plan, runs)
    controls = [name for name in plan.configurations if _is_control(plan, name)]
    others = [name for name in plan.configurations if name not in controls]
    variants = list(plan.variants)
    figure = Figure(figsize=(6.2 * len(variants) + 1.6, 5.6), layout="constrained")
    axes = figure.subplots(1, len(variants), squeeze=False, sharex=True, sharey=True)[0]
    for axis, variant in zip(axes, variants, strict=True):
        for name, full in plan.names(variant).items():
            if name in controls:
                _draw_path(axis, name, runs[full], tradeoff, str(0.7 * controls.index(name) / len(controls)), "--s")
            else:
                _draw_path(axis, name, runs[full], tradeoff, _COLORS[others.index(name) % len(_COLORS)], "-o")
        _, before, loss = losses_of(next(iter(runs.values()))[0], tradeoff)[0]
        axis.plot(loss, before, "*", color="black", markersize=14, label="before training")
        _label_axes(axis, variant, tradeoff)
    axes[0].set_ylabel(f"loss of `{tradeoff.forget}`, to be raised")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=130)


def _is_control(plan: Plan, name: str) -> bool:
    flags = plan.base | plan.configurations[name]
    return bool(flags.get("stock")) or flags.get("jd_weighting") in CONTROLS


def _draw_path(axis: Axes, name: str, seeds: Sequence[Results], tradeoff: Tradeoff, color: str, style: str) -> None:
    """Draw one configuration: the geometric mean over seeds, and each seed's end."""
    paths = [losses_of(results, tradeoff) for results in seeds]
    keep, forget = (
        [statistics.geometric_mean(at[i] for at in points) for points in zip(*paths, strict=True)] for i in (2, 1)
    )
    axis.plot(keep, forget, style, color=color, linewidth=1.6, markersize=5, markevery=[-1], label=name)
    if len(seeds) > 1:
        ends = [points[-1] for points in paths]
        axis.plot([end[2] for end in ends], [end[1] for end in ends], style[-1], color=color, markersize=3)


def _label_axes(axis: Axes, variant: str, tradeoff: Tradeoff) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.axhline(tradeoff.until, color="black", linewidth=0.8, linestyle=":")
    place = (0.99, tradeoff.until)
    axis.annotate(
        "above: everything is forgotten",
        place,
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize="small",
    )
    axis.set_title(variant)
    axis.set_xlabel(f"loss of `{tradeoff.keep}`, to be kept low")
    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        side.set_minor_locator(NullLocator())
    axis.spines[["top", "right"]].set_visible(False)

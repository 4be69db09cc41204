"""A run's logs -> pictures. Few groups are drawn as lines, more as rows of a map, where even forty stay legible."""

from __future__ import annotations

import io
import math
import statistics
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from hf_jd.report.history import History, Series, mean

INK, MUTED, GRID, ACCENT = "#1b1f27", "#5c6470", "#dfe3e8", "#2f5fd0"
COLOURS = ("#2f6fd6", "#d9601a", "#1d8a5f", "#a63d97", "#b58900", "#0f8fa8", "#c43b4e", "#5d6673")
"""The groups' lines; distinguishable with colour blindness."""
LINES = len(COLOURS)
"""The most groups that lines and colours can tell apart."""
DIVERGING = LinearSegmentedColormap.from_list("diverging", ("#c8401f", "#eaecf0", "#2563c4")).with_extremes(bad="white")
"""From negative over zero to positive: conflict is warm."""
PAIRS = 24
"""The most pairs of groups to show over time: those with the lowest cosines."""
BINS = 120
"""The most columns of a map over time, and points of a line; more are averaged."""
DOTS = 200
"""Dots per inch."""
WIDTH = 9.6
"""The width of every picture in inches, so that text has the same size on the page."""
NAME = 26
"""The most letters of a name."""

STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "xtick.labelcolor"), MUTED),
    "font.size": 9,
    "axes.edgecolor": GRID,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.linewidth": 0.8,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}


def losses(history: History) -> Figure | None:
    """Draw the training loss per group, with evaluations as dots; of many groups, as a multiple of its first value."""
    if not history.losses:
        return _total(history, "loss", "training loss")
    if len(history.losses) <= LINES:
        return _lines(history.losses, "loss", history.groups, dots=history.evaluations)
    first = {name: next((y for _, y in points if y > 0), math.nan) for name, points in history.losses.items()}
    return _rows(history.losses, first, "loss, against its first value", good="low")


def weights(history: History) -> Figure | None:
    """Draw the share of the weights per group; of many groups, as a multiple of an equal share."""
    if not history.weights:
        return None
    equal = 1 / len(history.weights)
    if len(history.weights) <= LINES:
        return _lines(history.weights, "share of the weights", history.groups, level=equal)
    return _rows(history.weights, dict.fromkeys(history.weights, equal), "share of the weights, against an equal one")


def matrix(history: History) -> Figure | None:
    """Draw the mean cosine of the rows of each pair of groups, over the whole run."""
    if not history.pairs:
        return None
    names = sorted({name for pair in history.pairs for name in pair})
    place = {name: i for i, name in enumerate(names)}
    # The lower triangle, without its empty first row and last column.
    table = [[math.nan] * (len(names) - 1) for _ in names[1:]]
    for pair, series in history.pairs.items():
        i, j = sorted(place[name] for name in pair)
        table[j - 1][i] = mean(series)
    few = len(names) <= 12
    figure, axes = _figure(1.0 + (0.5 if few else 0.185) * len(names))
    image = axes.imshow(table, cmap=DIVERGING, norm=TwoSlopeNorm(0, -1, 1), aspect="auto")
    size, labels = 9 if few else 7, [shown(name) for name in names]
    axes.set_xticks(range(len(names) - 1), labels[:-1], rotation=0 if len(names) <= 6 else 90, fontsize=size)
    axes.set_yticks(range(len(names) - 1), labels[1:], fontsize=size)
    for j, row in enumerate(table if few else []):
        for i, value in enumerate(row):
            if not math.isnan(value):
                axes.text(i, j, f"{value:.2f}", ha="center", va="center", color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _scale(axes, image, "mean cosine", {-1: "-1: opposed", 0: "0", 1: "1: aligned"})
    return figure


def conflicts(history: History) -> Figure | None:
    """Draw the share of conflicting pairs of objectives over time."""
    return _total(history, "jd/conflicts", "share of conflicting pairs", percent=True)


def pairs(history: History) -> Figure | None:
    """Draw the cosines of the pairs of groups that conflict most, over time."""
    chosen = sorted(history.pairs, key=lambda pair: mean(history.pairs[pair]))[:PAIRS]
    if not chosen:
        return None
    rows = [(f"{shown(a, 18)}  \N{MULTIPLICATION SIGN}  {shown(b, 18)}", history.pairs[a, b]) for a, b in chosen]
    return _map(rows, "cosine", 1, {-1: "-1", 0: "0", 1: "1"})


def norms(history: History) -> Figure | None:
    """Draw the norm of each group's row; of many groups, as a multiple of the median of all."""
    if not history.norms:
        return _total(history, "jd/grad_norm", "mean norm of a row")
    if len(history.norms) <= LINES:
        return _lines(history.norms, "norm of the row", history.groups, logarithmic=True)
    middle = statistics.median([norm for series in history.norms.values() for _, norm in series if norm > 0] or [1.0])
    return _rows(history.norms, dict.fromkeys(history.norms, middle), "norm of the row, against the median of all")


FIGURES: Mapping[str, Callable[[History], Figure | None]] = {
    "losses": losses,
    "weights": weights,
    "conflicts": matrix,
    "conflicts_over_time": conflicts,
    "pairs_over_time": pairs,
    "norms": norms,
}


def draw(history: History) -> dict[str, bytes]:
    """Draw all figures that have something to show, as PNGs by name."""
    pictures = {}
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters missing from the font are drawn as boxes
        for name, figure in ((name, of(history)) for name, of in FIGURES.items()):
            if figure is not None:
                figure.savefig(file := io.BytesIO(), dpi=DOTS)
                pictures[name] = file.getvalue()
    return pictures


# ---- Kinds of pictures ----


def _lines(
    series: Mapping[str, Series],
    label: str,
    groups: Sequence[str],
    *,
    dots: Mapping[str, Series] | None = None,
    level: float | None = None,
    logarithmic: bool = False,
) -> Figure:
    """Draw a line per group; the legend has the last values, sorted like the lines' ends."""
    figure, axes = _figure(3.9)
    edges, ends = _edges(series.values()), []
    for i, name in enumerate(groups):
        colour, curve = COLOURS[i % LINES], binned(series.get(name, []), edges)
        points = [(x, y) for x, y in zip(edges[1:], curve, strict=True) if math.isfinite(y)]
        if points:
            last, few = points[-1][1], len(points) < 3
            (line,) = axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.7, marker="o" if few else None)
            line.set(label=f"{shown(name)}  {last:.3g}", clip_on=not few)
            ends.append((last, line))
        if marks := (dots or {}).get(name):
            axes.plot(*zip(*marks, strict=True), "o", color=colour, markersize=4.5, mec="white", clip_on=False)
    if level is not None:
        axes.axhline(level, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_ylim(bottom=0)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.6)))
        axes.tick_params(axis="y", which="minor", length=0, labelcolor=INK)
    _frame(axes, edges, label)
    handles = [line for _, line in sorted(ends, key=lambda end: end[0], reverse=True)]
    figure.legend(handles=handles, loc="outside right center", frameon=False, labelcolor="linecolor")
    return figure


def _total(history: History, key: str, label: str, percent: bool = False) -> Figure | None:
    """Draw a single curve, for all objectives together; the page shows the number of a single log."""
    series = history.totals.get(key, [])
    if len(series) < 2:
        return None
    figure, axes = _figure(3.1)
    edges = _edges([series])
    axes.plot(edges[1:], binned(series, edges), color=ACCENT, linewidth=1.7)
    if percent:
        axes.set_ylim(0, max(0.05, max(value for _, value in series) * 1.1))
        axes.yaxis.set_major_formatter("{x:.0%}")
    _frame(axes, edges, label)
    return figure


def _rows(series: Mapping[str, Series], units: Mapping[str, float], label: str, good: str = "high") -> Figure:
    """Draw a row per group, sorted by last value, coloured by the base-2 logarithm of the value per unit."""
    logs = {
        name: [(x, math.log2(y / units[name])) for x, y in points if 0 < y / units[name] < math.inf]
        for name, points in series.items()
    }
    order = sorted(logs, key=lambda name: logs[name][-1][1] if logs[name] else -math.inf, reverse=True)
    sizes = sorted(abs(y) for points in logs.values() for _, y in points)
    bound = min(3, max(1, math.ceil(sizes[int(0.95 * len(sizes))]))) if sizes else 1
    ticks = {tick: f"\N{MULTIPLICATION SIGN} {2.0**tick:.3g}" for tick in range(-bound, bound + 1)}
    return _map([(shown(name), logs[name]) for name in order], label, bound, ticks, reverse=good == "low")


def _map(
    rows: Sequence[tuple[str, Series]], label: str, bound: int, ticks: Mapping[int, str], reverse: bool = False
) -> Figure:
    """Draw a row per label and series, over the steps, coloured from -bound to bound."""
    figure, axes = _figure(1.5 + 0.2 * len(rows))
    edges = _edges([points for _, points in rows])
    table = [binned(points, edges) for _, points in rows]
    colours = DIVERGING.reversed() if reverse else DIVERGING
    image = axes.pcolormesh(edges, range(len(table) + 1), table, cmap=colours, norm=TwoSlopeNorm(0, -bound, bound))
    axes.invert_yaxis()
    axes.set_yticks([i + 0.5 for i in range(len(rows))], [name for name, _ in rows], fontsize=8)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _scale(axes, image, label, ticks)
    return figure


# ---- Parts of pictures ----


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _frame(axes: Axes, edges: Sequence[float], label: str) -> None:
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _scale(axes: Axes, image: Any, label: str, ticks: Mapping[int, str]) -> None:
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.6, aspect=18, pad=0.02, label=label)
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def shown(name: str, letters: int = NAME) -> str:
    """Shorten a long name to its beginning and end, and escape what matplotlib would read as a formula."""
    end = letters // 3
    short = name if len(name) <= letters else f"{name[: letters - end - 1]}\N{HORIZONTAL ELLIPSIS}{name[-end:]}"
    return short.replace("$", r"\$")


# ---- Numbers ----


def _edges(series: Iterable[Series]) -> list[float]:
    """Return the edges of bins over all steps: one bin per log if there are few enough."""
    steps = sorted({step for points in series for step, _ in points})
    if not steps:
        return [0.0, 1.0]
    if len(steps) <= BINS:
        interval = steps[1] - steps[0] if len(steps) > 1 else 1
        return [float(max(0, steps[0] - interval)), *map(float, steps)]
    width = (steps[-1] - steps[0]) / BINS
    return [steps[0] + i * width - (0.5 if i == 0 else 0) for i in range(BINS + 1)]


def binned(series: Series, edges: list[float]) -> list[float]:
    """Average a series between neighbouring edges; NaN where it has no value."""
    bins: list[Series] = [[] for _ in edges[1:]]
    for step, value in series:
        at = bisect_left(edges, step, lo=1, hi=len(edges) - 1)  # the bin's right edge
        bins[at - 1].append((step, value))
    return [mean(points) for points in bins]

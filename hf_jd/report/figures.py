"""A run's logs -> pictures. Few groups are drawn as lines, more as rows of a map, where even forty stay legible."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hf_jd.report.history import LINES, History, Series, binned, mean
from hf_jd.report.theme import Theme

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

Draw = Callable[[History, Theme], Figure | None]


def losses(history: History, theme: Theme) -> Figure | None:
    """Draw the training loss per group, with evaluations as dots; of many groups, as a multiple of its first value."""
    if not history.losses:
        return _single(history, theme, "loss", "training loss")
    if len(history.losses) <= LINES:
        return _lines(history, theme, history.losses, "loss", dots=history.evaluations)
    return _rows(theme, _relative(history.losses), "loss, against its first value", good="low")


def weights(history: History, theme: Theme) -> Figure | None:
    """Draw the share of the weights per group; of many groups, as a multiple of an equal share."""
    count = len(history.weights)
    if not count:
        return None
    if count <= LINES:
        return _lines(history, theme, history.weights, "share of the weights", level=1 / count)
    shares = {name: [(step, value * count) for step, value in series] for name, series in history.weights.items()}
    return _rows(theme, shares, "share of the weights, against an equal one")


def norms(history: History, theme: Theme) -> Figure | None:
    """Draw the norm of each group's row; of many groups, as a multiple of the median of all."""
    if not history.norms:
        return _single(history, theme, "jd/grad_norm", "mean norm of a row")
    if len(history.norms) <= LINES:
        return _lines(history, theme, history.norms, "norm of the row", logarithmic=True)
    every = sorted(value for series in history.norms.values() for _, value in series if value > 0)
    middle = every[len(every) // 2] if every else 1.0
    scaled = {name: [(step, value / middle) for step, value in series] for name, series in history.norms.items()}
    return _rows(theme, scaled, "norm of the row, against the median of all")


def matrix(history: History, theme: Theme) -> Figure | None:
    """Draw the mean cosine of the rows of each pair of groups, over the whole run."""
    if not history.pairs:
        return None
    names = sorted({name for pair in history.pairs for name in pair})
    place = {name: i for i, name in enumerate(names)}
    table = [[math.nan] * len(names) for _ in names]
    for (a, b), series in history.pairs.items():
        i, j = sorted((place[a], place[b]))
        table[j][i] = mean(series)
    few, table = len(names) <= 12, [row[:-1] for row in table[1:]]  # the triangle has no first row and no last column
    side = 1.0 + (0.5 if few else 0.185) * len(names)
    figure = Figure(figsize=(WIDTH, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, cmap=_diverging(theme), norm=TwoSlopeNorm(0, -1, 1), aspect="auto")
    size, labels = 9 if few else 7, [shown(name) for name in names]
    axes.set_xticks(range(len(names) - 1), labels[:-1], rotation=0 if len(names) <= 6 else 90, fontsize=size)
    axes.set_yticks(range(len(names) - 1), labels[1:], fontsize=size)
    for j, row in enumerate(table if few else []):
        for i, value in enumerate(row):
            if not math.isnan(value):
                axes.text(i, j, f"{value:.2f}", ha="center", va="center", fontsize=9, color=theme.ink)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _bar(figure, axes, image, "mean cosine", [-1, -0.5, 0, 0.5, 1], ["-1: opposed", "-0.5", "0", "0.5", "1: aligned"])
    return figure


def pairs(history: History, theme: Theme) -> Figure | None:
    """Draw the share of conflicting pairs of objectives, and the cosines of the pairs that conflict most, over time."""
    chosen = sorted(history.pairs, key=lambda pair: mean(history.pairs[pair]))[:PAIRS]
    share = history.totals.get("jd/conflicts", [])
    share = share if len(share) > 1 else []  # A single log makes no curve; the page shows its number above.
    if not chosen:
        return _single(history, theme, "jd/conflicts", "share of conflicting pairs")
    height = 1.0 + max(1.3, 0.22 * len(chosen))
    figure = Figure(figsize=(WIDTH, height + (1.5 if share else 0)), layout="constrained")
    if share:
        top, axes = figure.subplots(2, height_ratios=[1.3, height], sharex=True)
        edges = _edges([share])
        top.plot(edges[1:], binned(share, edges), color=theme.accent, linewidth=1.6)
        top.set_ylim(0, max(0.05, max(v for _, v in share) * 1.1))
        top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        top.set_title("share of the pairs of objectives that conflict", loc="left", fontsize=9, color=theme.muted)
        _frame(top)
    else:
        axes = figure.subplots()
    every, few = "each pair of groups", f"the {PAIRS} of {len(history.pairs)} pairs of groups that conflict most"
    title = f"cosine of {few if len(history.pairs) > PAIRS else every}"
    axes.set_title(title, loc="left", fontsize=9, color=theme.muted)
    cross = "  \N{MULTIPLICATION SIGN}  "
    rows = [(shown(a, 18) + cross + shown(b, 18), history.pairs[a, b]) for a, b in chosen]
    image = _map(axes, theme, rows, TwoSlopeNorm(0, -1, 1))
    _bar(figure, axes, image, "cosine", [-1, 0, 1], ["-1", "0", "1"])
    return figure


FIGURES: Mapping[str, Draw] = {
    "losses": losses,
    "weights": weights,
    "conflicts": matrix,
    "conflicts_over_time": pairs,
    "norms": norms,
}


def draw(history: History, theme: Theme) -> dict[str, bytes]:
    """Draw all figures that have something to show, as PNGs by name."""
    muted = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "xtick.labelcolor")
    style: Any = dict.fromkeys(muted, theme.muted) | {
        "font.size": 9,
        "axes.edgecolor": theme.line,
        "axes.facecolor": theme.surface,
        "figure.facecolor": theme.surface,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.line,
        "grid.linewidth": 0.7,
        "axes.linewidth": 0.8,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "savefig.dpi": DOTS,
    }
    pictures = {}
    with rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters missing from the font are drawn as boxes
        for name, figure in ((name, of(history, theme)) for name, of in FIGURES.items()):
            if figure is not None:
                figure.savefig(file := io.BytesIO())
                pictures[name] = file.getvalue()
    return pictures


# ---- Parts of pictures ----


def shown(name: str, letters: int = NAME) -> str:
    """Shorten a long name to its beginning and end, and escape what matplotlib would read as a formula."""
    end = letters // 3
    short = name if len(name) <= letters else f"{name[: letters - end - 1]}\N{HORIZONTAL ELLIPSIS}{name[-end:]}"
    return short.replace("$", r"\$")


def _lines(
    history: History,
    theme: Theme,
    series: Mapping[str, Series],
    label: str,
    *,
    dots: Mapping[str, Series] | None = None,
    level: float | None = None,
    logarithmic: bool = False,
) -> Figure:
    ends: list[tuple[float, str]] = []
    colours = dict(zip(history.groups, theme.series, strict=False))
    if len({step for points in series.values() for step, _ in points}) < 2:
        return _bars(series, label, colours, level)
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    axes = figure.subplots()
    edges = _edges(series.values())
    dot: Any = {"markersize": 4.5, "mec": theme.surface, "mew": 0.8}
    for name in sorted(series):
        points = [(x, y) for x, y in zip(edges[1:], binned(series[name], edges), strict=True) if math.isfinite(y)]
        if not points:
            continue
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=colours[name], linewidth=1.7, marker="o" if len(points) < 3 else None, markersize=4)
        if marks := (dots or {}).get(name):
            axes.plot(*zip(*marks, strict=True), "o", color=colours[name], clip_on=False, **dot)
        ends.append((ys[-1], name))
    if level is not None:
        axes.axhline(level, color=theme.muted, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_ylim(bottom=0)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.tick_params(axis="y", which="minor", length=0, labelcolor=theme.ink)
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if _leads(value) else ""))
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylabel(label)
    axes.set_xlabel("step")
    _frame(axes)
    _end_labels(axes, ends, colours)
    return figure


def _bars(series: Mapping[str, Series], label: str, colours: Mapping[str, str], level: float | None) -> Figure:
    """Draw the values of a run with a single log, which makes no curve."""
    values = {name: value for name in sorted(series, reverse=True) for _, value in series[name] if math.isfinite(value)}
    figure = Figure(figsize=(WIDTH, 1.0 + 0.32 * max(1, len(values))), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([shown(name) for name in values], list(values.values()), color=[colours[name] for name in values])
    axes.bar_label(bars, [f"{value:.3g}" for value in values.values()], padding=4)
    axes.margins(x=0.12)
    if level is not None:
        axes.axvline(level, color=axes.xaxis.label.get_color(), linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xlabel(label)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _end_labels(axes: Axes, ends: Sequence[tuple[float, str]], colours: Mapping[str, str]) -> None:
    """Write names and last values next to the lines' ends, spaced apart, instead of a legend."""
    axes.figure.canvas.draw()
    place = axes.transAxes.inverted()
    heights = {name: place.transform(axes.transData.transform((0, value)))[1] for value, name in ends}
    order, gap = sorted(heights, key=lambda name: heights[name]), 0.068
    spots = [heights[name] for name in order]
    for i in range(1, len(spots)):
        spots[i] = max(spots[i], spots[i - 1] + gap)
    for i in range(len(spots) - 1, -1, -1):  # Push labels above the frame back down.
        spots[i] = min(spots[i], 1.0 if i == len(spots) - 1 else spots[i + 1] - gap)
    values = {name: value for value, name in ends}
    for name, y in zip(order, spots, strict=True):
        text = f"{shown(name)}  {values[name]:.3g}"
        axes.text(1.015, y, text, transform=axes.transAxes, color=colours[name], va="center", fontsize=9)


def _rows(theme: Theme, series: Mapping[str, Series], label: str, good: str = "high") -> Figure:
    """Draw a row per group, sorted by last value, coloured by the base-2 logarithm."""
    logs = {name: [(x, math.log2(y)) for x, y in points if 0 < y < math.inf] for name, points in series.items()}
    order = sorted(logs, key=lambda name: logs[name][-1][1] if logs[name] else -math.inf, reverse=True)
    figure = Figure(figsize=(WIDTH, 1.2 + 0.185 * len(logs)), layout="constrained")
    axes = figure.subplots()
    sizes = sorted(abs(y) for points in logs.values() for _, y in points)
    bound = min(3, max(1, math.ceil(sizes[int(0.95 * len(sizes))]))) if sizes else 1
    rows = [(shown(name), logs[name]) for name in order]
    image = _map(axes, theme, rows, TwoSlopeNorm(0, -bound, bound), reverse=good == "low")
    ticks = range(-bound, bound + 1)
    _bar(figure, axes, image, label, ticks, [f"\N{MULTIPLICATION SIGN} {2.0**tick:.3g}" for tick in ticks])
    return figure


def _map(
    axes: Axes, theme: Theme, rows: Sequence[tuple[str, Series]], norm: TwoSlopeNorm, reverse: bool = False
) -> Any:
    """Draw a row per label and series, over the steps."""
    edges = _edges([points for _, points in rows])
    table = [binned(points, edges) for _, points in rows]
    colours = _diverging(theme).reversed() if reverse else _diverging(theme)
    mesh = axes.pcolormesh(edges, range(len(table) + 1), table, cmap=colours, norm=norm)
    axes.invert_yaxis()
    labels = [label for label, _ in rows]
    axes.set_yticks([i + 0.5 for i in range(len(rows))], labels, fontsize=8 if len(rows) <= 30 else 7.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return mesh


def _single(history: History, theme: Theme, key: str, label: str) -> Figure | None:
    """Draw a single curve, for all objectives together."""
    series = history.totals.get(key, [])
    if len(series) < 2:
        return None
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    axes = figure.subplots()
    edges = _edges([series])
    axes.plot(edges[1:], binned(series, edges), color=theme.accent, linewidth=1.7)
    axes.set_ylabel(label)
    axes.set_xlabel("step")
    _frame(axes)
    return figure


def _bar(figure: Figure, axes: Axes, image: Any, label: str, ticks: Sequence[float], names: Sequence[str]) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=18, pad=0.02)
    bar.set_ticks(list(ticks), labels=list(names))
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _frame(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _diverging(theme: Theme) -> Colormap:
    return LinearSegmentedColormap.from_list("diverging", theme.diverging).with_extremes(bad=theme.surface)


def _relative(series: Mapping[str, Series]) -> dict[str, Series]:
    """Express each series as multiples of its first value above 0."""
    relative = {}
    for name, points in series.items():
        first = next((value for _, value in points if value > 0), math.nan)
        relative[name] = [(step, value / first) for step, value in points]
    return relative


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


def _leads(value: float) -> bool:
    """Whether a number is 2 or 5 times a power of ten: enough labels to read a narrow range."""
    return round(value / 10 ** math.floor(math.log10(value))) in (2, 5)

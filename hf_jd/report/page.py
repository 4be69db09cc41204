"""A run's logs -> one self-contained page of HTML, whose texts are in `page.html`."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from hf_jd.report.figures import LINES
from hf_jd.report.history import History, mean
from hf_jd.report.verdict import setup, verdict, why_pairs


def page(history: History, images: Mapping[str, bytes]) -> str:
    """Build the page.

    Args:
        history: The run's logs.
        images: PNGs by the figures' names, without figures that have nothing to show.
    """
    template = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined).from_string(
        Path(__file__).with_name("page.html").read_text("utf-8")
    )
    return template.render(
        title=history.folder.resolve().name,
        history=history,
        last=datetime.fromtimestamp(history.source.stat().st_mtime, timezone.utc),
        setup=setup(history.facts),
        verdict=verdict(history),
        why_pairs=why_pairs(history),
        tiles=_tiles(history),
        few=len(history.groups) <= LINES,
        images={name: f"data:image/png;base64,{b64encode(image).decode()}" for name, image in images.items()},
        groups={name: _cells(history, name) for name in history.groups},
    )


def _tiles(history: History) -> dict[str, str]:
    """Return the run in a few numbers, by what they say."""
    numbers = {"groups": f"{len(history.groups)}"} if history.groups else {}
    if loss := history.totals.get("loss"):
        numbers["loss, first to last"] = f"{number(loss[0][1])} \N{RIGHTWARDS ARROW} {number(loss[-1][1])}"
    if conflicts := history.totals.get("jd/conflicts"):
        numbers["pairs in conflict, mean"] = f"{mean(conflicts):.0%}"
    if history.against:
        worst, share = history.worst
        short = worst if len(worst) <= 20 else f"{worst[:19]}\N{HORIZONTAL ELLIPSIS}"
        numbers[f"of steps went against {short if share else 'any group'}"] = f"{share:.0%}"
    return numbers


def _cells(history: History, name: str) -> list[str]:
    """Return a group's numbers: its loss, first and last, share of the weights, norm and steps against it."""
    losses = history.losses.get(name, [(0, math.nan)])
    weight, norm, against = (mean(series.get(name, [])) for series in (history.weights, history.norms, history.against))
    return [number(losses[0][1]), number(losses[-1][1]), number(weight, ".1%"), number(norm), number(against, ".0%")]


def number(value: float, form: str = "") -> str:
    """Format a number; by default with three digits, without powers of ten where a person would write it out."""
    if math.isnan(value):
        return "\N{EN DASH}"
    return format(value, form or (".3g" if abs(value) < 1000 or abs(value) >= 1e6 else ",.0f"))

"""Pictures and numbers -> one self-contained page of HTML."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from hf_jd.report.history import LINES, History, mean
from hf_jd.report.theme import DARK, LIGHT
from hf_jd.report.verdict import setup, verdict, why_pairs


@dataclass(frozen=True)
class Text:
    """The text around a picture.

    Attributes:
        title: The heading.
        few: What the picture shows, if groups are lines.
        look: What to look for.
        many: What the picture shows if there are more groups, if that differs.
    """

    title: str
    few: str
    look: str
    many: str = ""


TEXTS = {
    "losses": Text(
        "Losses",
        "Each group's training loss. Dots are evaluations, if there are any.",
        "Does every group get better? A group that rises while the others fall is being sacrificed.",
        "Each group's training loss, as a multiple of its first value: blue has fallen, red has risen. The highest "
        "are at the top.",
    ),
    "weights": Text(
        "Weights",
        "Each group's share of the weights. The dashed line is an equal share.",
        "A share far above an equal one: without it, the others would outvote the group. A share near 0 over many "
        "steps: the others also help the group, or its rows are long. Influence is share times norm (below).",
        "Each group's share of the weights, relative to an equal share: blue is more, red is less. The largest are "
        "at the top.",
    ),
    "conflicts": Text(
        "Conflicts between groups",
        "The mean cosine between the gradients of each pair of groups, over the whole run.",
        "Below 0 (red), a step for one group works against the other. If all cosines are near 0 or above, the groups "
        "don't disturb each other, and any weighting will do much the same as the mean.",
    ),
    "conflicts_over_time": Text(
        "Conflicts over time",
        "How many pairs of objectives have gradients that point against each other, and the cosines between groups. "
        "Empty where two groups shared no update.",
        "Late conflict is common: losses are low then, and gradients are mostly noise. A pair that is red throughout "
        "is a real conflict: look at what these two groups ask for.",
        "How many pairs of objectives have gradients that point against each other, and the cosines of the pairs of "
        "groups that conflict most. Empty where two groups shared no update.",
    ),
    "norms": Text(
        "Norms of rows",
        "The length of each group's gradient, before the weighting, on a logarithmic scale.",
        "Lengths that differ by a factor of ten or more matter a lot: long ones dominate the mean, short ones MGDA. "
        "A jump is a batch worth looking at.",
        "The length of each group's gradient, before the weighting, relative to the median of all: blue is longer, "
        "red is shorter. The longest are at the top.",
    ),
}
_ONE_LOSS = Text(
    "Losses",
    "The training loss of all objectives together.",
    "Does it fall? Whether that is at the expense of some examples, only losses by group tell: they need "
    "--jd_group_column, and a loss per example, which DPO and the like don't have.",
)
_POLICY_LOSS = Text(
    "Losses",
    "The policy loss of all objectives together.",
    "Nothing: it stays near 0, whatever is learned. Look at the rewards in the log (`rewards/NAME/mean`).",
)


def page(history: History, images: Mapping[str, Mapping[str, bytes]]) -> str:
    """Build the page.

    Args:
        history: The run's logs.
        images: PNGs by the names of theme and figure, without figures that have nothing to show.
    """
    template = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined).from_string(
        Path(__file__).with_name("page.html").read_text("utf-8")
    )
    drawn = images[LIGHT.name]
    return template.render(
        title=history.folder.resolve().name,
        history=history,
        last=datetime.fromtimestamp(history.source.stat().st_mtime, timezone.utc),
        setup=setup(history.facts),
        verdict=verdict(history),
        tiles=_tiles(history),
        sections=[_section(name, history, images) for name in TEXTS if name in drawn],
        missing=[text.title.lower() for name, text in TEXTS.items() if name not in drawn],
        groups={name: _cells(history, name) for name in history.groups},
        light=LIGHT,
        dark=DARK,
    )


def _tiles(history: History) -> dict[str, str]:
    """Return the run in a few numbers, by what they say."""
    numbers = {"groups": f"{len(history.groups)}"} if history.groups else {}
    if loss := history.totals.get("loss"):
        numbers["loss, first to last"] = f"{number(loss[0][1])} \N{RIGHTWARDS ARROW} {number(loss[-1][1])}"
    if conflicts := history.totals.get("jd/conflicts"):
        numbers["pairs in conflict, mean"] = f"{mean(conflicts):.0%}"
    if history.against:
        shares = {name: mean(series) for name, series in history.against.items()}
        worst = max(shares, key=lambda name: (shares[name], name))
        short = worst if len(worst) <= 20 else f"{worst[:19]}\N{HORIZONTAL ELLIPSIS}"
        numbers[f"of steps went against {short if shares[worst] else 'any group'}"] = f"{shares[worst]:.0%}"
    return numbers


def _section(name: str, history: History, images: Mapping[str, Mapping[str, bytes]]) -> dict[str, str]:
    """Return a picture, light and dark, and its texts."""
    text = TEXTS[name]
    if name == "losses" and not history.losses:
        text = _POLICY_LOSS if history.facts.get("jd_objectives") == "reward" else _ONE_LOSS
    more = f" {why_pairs(history)}" if name == "conflicts_over_time" else ""
    return {
        "name": name,
        "title": text.title,
        "shown": (len(history.groups) > LINES and text.many) or text.few,
        "look": text.look + more,
        **{theme: f"data:image/png;base64,{base64.b64encode(of[name]).decode()}" for theme, of in images.items()},
    }


def _cells(history: History, name: str) -> list[str]:
    """Return a group's numbers: its loss, first and last, share of the weights, norm and steps against it."""
    losses, weights, norms, against = (
        series.get(name, []) for series in (history.losses, history.weights, history.norms, history.against)
    )
    first, last = (losses[0][1], losses[-1][1]) if losses else (math.nan, math.nan)
    return [
        number(first),
        number(last),
        number(mean(weights), ".1%"),
        number(mean(norms)),
        number(mean(against), ".0%"),
    ]


def number(value: float, form: str = "") -> str:
    """Format a number; by default with three digits, without powers of ten where a person would write it out."""
    if math.isnan(value):
        return "\N{EN DASH}"
    return format(value, form or (".3g" if abs(value) < 1000 or abs(value) >= 1e6 else ",.0f"))

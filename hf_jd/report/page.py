"""Pictures and numbers -> one self-contained page of HTML."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape

from hf_jd.report.history import LINES, History, Series, mean
from hf_jd.report.theme import DARK, LIGHT, Theme
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
        "steps: the others help the group along, or its rows are long. Influence is share times norm (below).",
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
        "Lengths that differ by a factor of ten or more matter a lot: long ones win in the mean, short ones in MGDA. "
        "A jump is a batch worth looking at.",
        "The length of each group's gradient, before the weighting, relative to the median of all: blue is longer, "
        "red is shorter. The longest are at the top.",
    ),
}
_ONE_LOSS = Text(
    "Losses",
    "The training loss of all objectives together.",
    "Does it fall? Whether that is at the expense of some examples, only losses by group tell (--jd_group_column).",
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
    drawn = images[LIGHT.name]
    sections = "\n".join(_section(name, images, history) for name in TEXTS if name in drawn)
    missing = [TEXTS[name].title.lower() for name in TEXTS if name not in drawn]
    note = f'<p class="note">Not logged in this run: {", ".join(missing)}.</p>' if missing else ""
    facts, judgement = (escape(text, quote=False) for text in (setup(history.facts), verdict(history)))
    title = escape(history.folder.resolve().name)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} - hf_jd report</title>
<link rel="icon" href="data:,">
<style>
{_style()}
</style>
</head>
<body>
<main>
<header>
<p class="kind">hf_jd report</p>
<h1>{title}</h1>
<p class="status">{_status(history)}</p>
{f'<p class="setup">{facts}</p>' if facts else ""}
</header>
{f'<p class="verdict">{judgement}</p>' if judgement else ""}
{_tiles(history)}
{sections}
{note}
{_table(history)}
<footer>Read from {escape(history.source.name)}. A weighting's guarantees hold for the direction that the optimizer
receives, before clipping, and not for the optimizer's own step.</footer>
</main>
</body>
</html>
"""


def _status(history: History) -> str:
    steps = f"{history.steps:,} of {history.max_steps:,} steps" if history.max_steps else f"{history.steps:,} steps"
    state = "finished" if history.finished else "running, or ended early"
    kind = "done" if history.finished else "open"
    last = datetime.fromtimestamp(history.source.stat().st_mtime, timezone.utc)
    return f'<span class="dot {kind}"></span>{state} &middot; {steps} &middot; last log {last:%Y-%m-%d %H:%M} UTC'


def _tiles(history: History) -> str:
    numbers = {"groups": f"{len(history.groups)}"} if history.groups else {}
    if loss := history.totals.get("loss"):
        numbers["loss, first to last"] = f"{number(loss[0][1])} &rarr; {number(loss[-1][1])}"
    if conflicts := history.totals.get("jd/conflicts"):
        numbers["pairs in conflict, mean"] = f"{mean(conflicts):.0%}"
    if history.against:
        shares = {name: mean(series) for name, series in history.against.items()}
        worst = max(shares, key=lambda name: (shares[name], name))
        label = f"of steps went against {escape(_short(worst))}" if shares[worst] else "of steps went against any group"
        numbers[label] = f"{shares[worst]:.0%}"
    tiles = "".join(f"<div><b>{value}</b><span>{label}</span></div>" for label, value in numbers.items())
    return f'<div class="tiles">{tiles}</div>'


def _section(name: str, images: Mapping[str, Mapping[str, bytes]], history: History) -> str:
    text = _text(name, history)
    shown = (len(history.groups) > LINES and text.many) or text.few
    more = f" {why_pairs(history)}" if name == "conflicts_over_time" else ""
    light, dark = (_inline(images[theme.name][name]) for theme in (LIGHT, DARK))
    return f"""<section id="{name}">
<h2>{text.title}</h2>
<p>{shown}</p>
<div class="wide"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">
<img src="{light}" alt="{text.title}"></picture></div>
<p class="look"><b>What to look for</b> {text.look}{more}</p>
</section>"""


def _text(name: str, history: History) -> Text:
    if name != "losses" or history.losses:
        return TEXTS[name]
    return _POLICY_LOSS if history.facts.get("jd_objectives") == "reward" else _ONE_LOSS


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _table(history: History) -> str:
    if not history.groups:
        return ""
    heads = ("loss, first", "loss, last", "share of weights, mean", "norm of row, mean", "steps against it")
    rows = "\n".join(_row(history, name) for name in history.groups)
    return f"""<section id="groups">
<h2>Groups in numbers</h2>
<div class="wide"><table>
<thead><tr><th>group</th>{"".join(f"<th>{head}</th>" for head in heads)}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
</section>"""


def _row(history: History, name: str) -> str:
    losses = history.losses.get(name, [])
    values = [
        number(losses[0][1] if losses else math.nan),
        number(losses[-1][1] if losses else math.nan),
        _share(history.weights.get(name, []), "{:.1%}"),
        number(mean(history.norms.get(name, []))),
        _share(history.against.get(name, []), "{:.0%}"),
    ]
    return f"<tr><td>{escape(name)}</td>{''.join(f'<td>{value}</td>' for value in values)}</tr>"


def _share(series: Series, form: str) -> str:
    value = mean(series)
    return "&ndash;" if math.isnan(value) else form.format(value)


def number(value: float) -> str:
    """Format a number with three digits, without powers of ten where a person would write it out."""
    if math.isnan(value):
        return "&ndash;"
    return f"{value:.3g}" if abs(value) < 1000 or abs(value) >= 1e6 else f"{value:,.0f}"


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}\N{HORIZONTAL ELLIPSIS}"


def _colours(theme: Theme) -> str:
    return (
        f"--page: {theme.page}; --surface: {theme.surface}; --ink: {theme.ink}; --muted: {theme.muted}; "
        f"--line: {theme.line}; --accent: {theme.accent}; --good: {theme.series[2]};"
    )


def _style() -> str:
    return f""":root {{ {_colours(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_colours(DARK)} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }}
main {{ max-width: 1040px; margin: 0 auto; padding: 40px 20px 64px; }}
h1 {{ font-size: 30px; line-height: 1.2; margin: 2px 0 6px; overflow-wrap: anywhere; }}
h2 {{ font-size: 20px; margin: 0 0 4px; }}
p {{ margin: 0 0 14px; color: var(--muted); }}
.kind {{ font-size: 13px; letter-spacing: .06em; text-transform: uppercase; margin: 0; }}
.status {{ font-variant-numeric: tabular-nums; }}
.dot {{ display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 8px;
  background: var(--accent); }}
.dot.done {{ background: var(--good); }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin: 22px 0; }}
.tiles div, section {{ background: var(--surface); border: 1px solid var(--line); border-radius: 12px; }}
.tiles div {{ padding: 16px 18px; }}
.tiles b {{ display: block; font-size: 24px; line-height: 1.3; white-space: nowrap;
  font-variant-numeric: tabular-nums; }}
.tiles span {{ font-size: 14px; color: var(--muted); overflow-wrap: anywhere; }}
section {{ padding: 22px 24px; margin: 0 0 18px; }}
img {{ display: block; width: 100%; height: auto; }}
.verdict {{ font-size: 18px; color: var(--ink); border-left: 4px solid var(--accent); padding-left: 14px; }}
@media (max-width: 700px) {{
  main {{ padding: 24px 10px 40px; }}
  section {{ padding: 16px 12px; }}
  .wide img {{ width: 860px; max-width: none; }}  /* Scroll the picture rather than shrink its text. */
}}
.look {{ margin: 14px 0 0; padding-top: 12px; border-top: 1px solid var(--line); }}
.look b {{ color: var(--ink); margin-right: 6px; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 7px 10px; text-align: right; border-bottom: 1px solid var(--line); }}
th {{ color: var(--muted); font-weight: 500; vertical-align: bottom; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; overflow-wrap: anywhere; }}
tbody tr:last-child td {{ border-bottom: 0; }}
.note, footer {{ font-size: 14px; color: var(--muted); }}"""

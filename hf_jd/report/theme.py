"""The colours of pictures and page, light and dark."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """The colours of the pictures, and of the page around them.

    Attributes:
        name: Part of the pictures' file names.
        surface: The background of pictures.
        page: The background of the page.
        ink: Text.
        muted: Secondary text.
        line: Grid and frames.
        accent: A single curve.
        series: Up to eight groups; distinguishable with colour blindness.
        diverging: From negative over zero to positive: conflict is warm.
    """

    name: str
    surface: str
    page: str
    ink: str
    muted: str
    line: str
    accent: str
    series: tuple[str, ...]
    diverging: tuple[str, str, str]


LIGHT = Theme(
    name="light",
    surface="#ffffff",
    page="#f5f6f8",
    ink="#1b1f27",
    muted="#5c6470",
    line="#dfe3e8",
    accent="#2f5fd0",
    series=("#2f6fd6", "#d9601a", "#1d8a5f", "#a63d97", "#b58900", "#0f8fa8", "#c43b4e", "#5d6673"),
    diverging=("#c8401f", "#eaecf0", "#2563c4"),
)
DARK = Theme(
    name="dark",
    surface="#1a1e26",
    page="#11141a",
    ink="#e8ebf0",
    muted="#a0a9b6",
    line="#323946",
    accent="#7ba4ff",
    series=("#6fa3ff", "#ff9559", "#4fcf9c", "#df86d2", "#e3bb3f", "#4cc7df", "#ff8091", "#aab3c0"),
    diverging=("#ff7a52", "#2f3643", "#6ea3ff"),
)
THEMES = (LIGHT, DARK)

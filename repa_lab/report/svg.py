"""Colours of figures, and SVG files as elements of a page that has colours of its own. Imports no drawing library."""

from __future__ import annotations

import re

PALETTE = ("#0b6fb8", "#d1570a", "#128a5f", "#a83a86", "#8a6d00", "#5b4bb5")
GREY = "#7d848c"
FAINT = "#cdd2d8"
INK = "#24292f"
SOFT = "#57606a"
# Variables of the page's style sheet; other colours, such as mixed greys, are legible on light and dark.
_VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    "#6e7781": "--soft",
    "#9aa1a9": "--axis",
    "#e6e8eb": "--grid",
    FAINT: "--faint",
    "#ffffff": "--paper",
    **{hue: f"--series-{place}" for place, hue in enumerate(PALETTE)},
}


def inline(svg: str, name: str) -> str:
    """Return an SVG file as an element of a page, with the page's colours.

    Args:
        svg: the file.
        name: unique prefix of the element's ids within the page.
    """
    svg = re.sub(r'(\bid="|url\(#|href="#)', lambda match: f"{match[1]}{name}-", svg[svg.index("<svg") :])
    svg = re.sub(r"(?<=[:\s])#[0-9a-f]{6}\b", lambda match: _variable(match[0]), svg)
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2).strip()


def _variable(color: str) -> str:
    return f"var({_VARIABLES[color]})" if color in _VARIABLES else color

"""Tables of numbers between pairs as coloured cells: inline SVG, legible with and without colour.

A cell's colour is mixed in the browser from the page's own (`--f0` above zero, `--f1` below, and
`--heat` for the strongest), so that it fits a light and a dark page.
"""

import html
import math
from collections.abc import Sequence

import numpy as np

# Up to so many columns the numbers stand in the cells; beyond, they show on hovering.
_NUMBERED = 14
_LONGEST_NAME = 24


def heat_map(
    values: np.ndarray,
    names: Sequence[str],
    *,
    title: str,
    limit: float,
    grey: np.ndarray | None = None,
    rules: Sequence[int] = (),
    digits: int = 2,
) -> str:
    """Returns a square table of coloured cells; columns carry the numbers of the rows.

    Args:
      values: [N, N]; NaN leaves a cell empty.
      names: N names of rows and columns.
      title: read by screen readers and shown on hovering.
      limit: the absolute value with the strongest colour.
      grey: bool [N, N]; hatched cells, whose number is not to be relied on.
      rules: rows (and columns) before which a line is drawn.
      digits: of the numbers in the cells, after the point.
    """
    count = len(names)
    numbered = count <= _NUMBERED
    # As wide as the widest number, about 7 units a character.
    shown = [f"{v:.{digits}f}" for v in np.ravel(values) if not math.isnan(v)]
    cell = max([34.0, *(7.0 * len(text) + 8 for text in shown)]) if numbered else 16.0
    tall = 30.0 if numbered else 16.0
    longest = max((len(name) for name in names), default=0)
    left = 32 + 7.2 * min(longest, _LONGEST_NAME)
    width, height = left + cell * count + 4, 22 + tall * count + 4
    parts = [
        f'<svg class="heat" style="width: {width:.0f}px" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'role="img" aria-label="{html.escape(title)}"><title>{html.escape(title)}</title>'
    ]
    for i, name in enumerate(names):
        y = 22 + tall * i
        short = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
        parts.append(_text(24, y + tall / 2 + 4, str(i + 1), "end", "tick"))
        parts.append(
            f'<text class="label" x="31" y="{y + tall / 2 + 4:.1f}">{html.escape(short)}'
            f"<title>{html.escape(name)}</title></text>"
        )
        if numbered or (i + 1) % 5 == 0:
            parts.append(_text(left + cell * (i + 0.5), 15, str(i + 1), "middle", "tick"))
        for j, other in enumerate(names):
            value = float(values[i][j])
            if math.isnan(value):
                continue
            x = left + cell * j
            hatched = grey is not None and bool(grey[i][j])
            hint = f"{name}, {other}: {value:.{digits + 1}f}"
            parts.append(
                f'<rect class="{"grey" if hatched else "cell"}" x="{x:.1f}" y="{y:.1f}" '
                f'width="{cell - 1:.1f}" height="{tall - 1:.1f}"'
                + ("" if hatched else f' style="fill: {_colour(value, limit)}"')
                + f"><title>{html.escape(hint)}</title></rect>"
            )
            if numbered:
                style = "faint" if hatched else "number"
                text = f"{value:.{digits}f}"
                parts.append(_text(x + cell / 2, y + tall / 2 + 4, text, "middle", style))
    for rule in rules:
        x, y = left + cell * rule - 0.5, 22 + tall * rule - 0.5
        parts.append(_line(left, width - 4, y, y) + _line(x, x, 22, height - 4))
    return "".join(parts) + "</svg>"


def _colour(value: float, limit: float) -> str:
    strength = min(abs(value) / limit, 1.0) if limit > 0 else 0.0
    hue = "--f0" if value >= 0 else "--f1"
    return f"color-mix(in oklab, var({hue}) calc(var(--heat) * {strength:.3f}), var(--paper))"


def _line(x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="rule" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, style: str) -> str:
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )

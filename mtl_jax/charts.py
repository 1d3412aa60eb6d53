"""Small charts as inline SVG text, for pages that must work offline, on a phone and in print.

Colours come from CSS classes (`line-0`, `grid`, ...) so that a page can have a light and a dark
face; every name that goes into the text is escaped here.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

# More points than pixels only make the page heavy.
_MAXIMUM_POINTS = 400


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve: its name in the legend, its points (x, y) and its CSS class."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str


def ticks(low: float, high: float, count: int) -> list[float]:
    """Returns about `count` round numbers (1, 2 or 5 times a power of ten) in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def thin(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """Returns at most `limit` points: means over equal runs of neighbours."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / limit)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(run[-1][0], sum(y for _, y in run) / len(run)) for run in runs]


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Returns a centred moving average over `window` points, narrower towards the ends."""
    half = window // 2
    averaged = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        near = [y for _, y in points[index - reach : index + reach + 1]]
        averaged.append((x, sum(near) / len(near)))
    return averaged


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: int = 1000,
    height: int = 300,
    legend: bool = True,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Returns a line chart with axes, grid, labels and a legend, or "" without any point.

    Args:
      lines: the curves; later ones are drawn on top.
      title: read by screen readers and shown on hovering.
      x_label: below the horizontal axis.
      y_label: above the vertical axis.
      width: units of the drawing; one unit is one pixel at natural size.
      height: the same.
      legend: whether to show the names of the curves.
      x_range: limits of the horizontal axis; those of the data by default.
      y_range: the same for the vertical axis.
    """
    lines = [dataclasses.replace(line, points=thin(line.points, _MAXIMUM_POINTS)) for line in lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    x_low, x_high = x_range or _limits([x for x, _ in points])
    y_low, y_high = y_range or _limits([y for _, y in points])
    y_ticks = ticks(y_low, y_high, max(2, height // 55))
    if y_range is None and len(y_ticks) > 1:
        # The axis runs from one round number to another.
        step = y_ticks[1] - y_ticks[0]
        y_low, y_high = math.floor(y_low / step) * step, math.ceil(y_high / step) * step
        y_ticks = ticks(y_low, y_high, round((y_high - y_low) / step))
    x_ticks = ticks(x_low, x_high, max(2, width // 90))
    left = 12 + 7.5 * max(len(_number(tick)) for tick in y_ticks)
    right, top, bottom = width - 16.0, 46.0 if legend else 26.0, height - 40.0

    def x_of(x: float) -> float:
        return left + (x - x_low) / ((x_high - x_low) or 1) * (right - left)

    def y_of(y: float) -> float:
        return bottom - (y - y_low) / ((y_high - y_low) or 1) * (bottom - top)

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title)}"><title>{html.escape(title)}</title>'
    ]
    parts += [_level(left, right, y_of(tick), _number(tick)) for tick in y_ticks]
    parts += [_mark(x_of(tick), bottom, _number(tick), width) for tick in x_ticks]
    parts.append(
        f'<line class="axis" x1="{left:.1f}" x2="{right:.1f}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>'
    )
    parts.append(_text((left + right) / 2, height - 6, x_label, "middle", "label"))
    parts.append(_text(4, 13, y_label, "start", "label"))
    for line in lines:
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line.points)
        parts.append(
            f'<polyline class="{line.style}" points="{path}"><title>{html.escape(line.name)}'
            "</title></polyline>"
        )
        if len(line.points) == 1:
            (x, y) = line.points[0]
            parts.append(
                f'<circle class="{line.style}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3"/>'
            )
    if legend:
        parts.append(_legend(lines, left))
    return "".join(parts) + "</svg>"


def _level(left: float, right: float, y: float, label: str) -> str:
    """Returns a line of the grid with its number on the left."""
    return (
        f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        + _text(left - 7, y + 4, label, "end")
    )


def _mark(x: float, bottom: float, label: str, width: float) -> str:
    """Returns a mark of the horizontal axis with its number, kept inside the drawing."""
    return (
        f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" y2="{bottom + 4:.1f}"/>'
        + _text(min(max(x, 16), width - 22), bottom + 18, label, "middle")
    )


def _legend(lines: Sequence[Line], left: float) -> str:
    parts, x = [], left
    for line in lines:
        parts.append(
            f'<line class="{line.style} key" x1="{x:.1f}" x2="{x + 18:.1f}" y1="31" y2="31"/>'
        )
        parts.append(_text(x + 24, 35, line.name, "start"))
        x += 24 + 7.2 * len(line.name) + 18
    return "".join(parts)


def prompt_strip(
    values: Sequence[float],
    low: float,
    high: float,
    median: float,
    marks: Sequence[tuple[str, float]],
    *,
    width: int = 220,
) -> str:
    """Returns a strip with a dot for each prompt, a bar at the median and ticks for baselines.

    Args:
      values: one value per prompt.
      low: value at the left end.
      high: value at the right end.
      median: drawn as a bar.
      marks: baselines as (CSS class, value).
      width: units of the drawing.
    """
    height, margin = 26, 6

    def x_of(value: float) -> float:
        return margin + (value - low) / ((high - low) or 1) * (width - 2 * margin)

    parts = [
        f'<svg class="strip" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="median {median:g} of {len(values)} prompts">'
        f'<line class="grid" x1="{margin}" x2="{width - margin}" y1="13" y2="13"/>'
    ]
    for style, value in marks:
        x = x_of(value)
        parts.append(
            f'<line class="{style}" x1="{x:.1f}" x2="{x:.1f}" y1="3" y2="23">'
            f"<title>{style} {value:g}</title></line>"
        )
    parts += [f'<circle class="dot" cx="{x_of(value):.1f}" cy="13" r="4"/>' for value in values]
    x = x_of(median)
    parts.append(f'<line class="median" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="22"/></svg>')
    return "".join(parts)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _number(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:g}"


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )

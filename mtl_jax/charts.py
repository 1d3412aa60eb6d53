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
    frame = _frame(
        x_range or _limits([x for x, _ in points]),
        y_range or _limits([y for _, y in points]),
        round_y=y_range is None,
        top=46.0 if legend else 26.0,
        size=(width, height),
        names=(title, x_label, y_label),
    )
    x_of, y_of, parts = frame.x_of, frame.y_of, frame.parts
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
        parts.append(_legend(lines, frame.left))
    return "".join(parts) + "</svg>"


def stacked_area(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: int = 1000,
    height: int = 300,
) -> str:
    """Returns areas on top of each other, the first at the bottom, or "" without any point.

    Args:
      lines: values of at least 0; a value missing at a step of another counts as 0.
      title: read by screen readers and shown on hovering.
      x_label: below the horizontal axis.
      y_label: above the vertical axis.
      width: units of the drawing; one unit is one pixel at natural size.
      height: the same.
    """
    known = [dict(line.points) for line in lines]
    steps = sorted({x for values in known for x in values})
    if not steps:
        return ""
    columns = [
        [y for _, y in thin([(x, values.get(x, 0.0)) for x in steps], _MAXIMUM_POINTS)]
        for values in known
    ]
    xs = [x for x, _ in thin([(x, 0.0) for x in steps], _MAXIMUM_POINTS)]
    if len(xs) == 1:  # an area needs two ends
        xs, columns = [xs[0] - 0.5, xs[0] + 0.5], [column * 2 for column in columns]
    floors = [[0.0] * len(xs)]
    for column in columns:
        floors.append([low + y for low, y in zip(floors[-1], column, strict=True)])
    frame = _frame(
        (xs[0], xs[-1]),
        (0.0, max(floors[-1]) or 1.0),
        round_y=False,
        top=26.0,
        size=(width, height),
        names=(title, x_label, y_label),
    )
    for line, low, high in zip(lines, floors[:-1], floors[1:], strict=True):
        there = [(x, y) for x, y in zip(xs, high, strict=True)]
        back = [(x, y) for x, y in zip(xs[::-1], low[::-1], strict=True)]
        path = " ".join(f"{frame.x_of(x):.1f},{frame.y_of(y):.1f}" for x, y in there + back)
        frame.parts.append(
            f'<polygon class="{line.style}" points="{path}"><title>{html.escape(line.name)}'
            "</title></polygon>"
        )
    return "".join(frame.parts) + "</svg>"


@dataclasses.dataclass(frozen=True)
class Spot:
    """A point of a scatter plot: its mark, its name, and the ends of its intervals if it has any.

    `style` is a CSS class; `round` spots are circles, the others diamonds, so that no colour is
    needed to tell them apart.
    """

    mark: str
    name: str
    x: float
    y: float
    style: str
    round: bool = True
    x_ends: tuple[float, float] | None = None
    y_ends: tuple[float, float] | None = None


def scatter(
    spots: Sequence[Spot],
    *,
    title: str,
    x_label: str,
    y_label: str,
    stairs: Sequence[tuple[float, float]] = (),
    lower: tuple[bool, bool] = (False, False),
    width: int = 640,
    height: int = 420,
) -> str:
    """Returns a scatter plot with intervals as thin crosses, or "" without spots.

    Args:
      spots: later ones are drawn on top.
      title: read by screen readers and shown on hovering.
      x_label: below the horizontal axis.
      y_label: above the vertical axis.
      stairs: points of a Pareto front, from the worst x to the best, joined as a staircase around
        what they dominate.
      lower: for each axis whether lower is better.
      width: units of the drawing; one unit is one pixel at natural size.
      height: the same.
    """
    if not spots:
        return ""
    frame = _frame(
        interval_limits([(spot.x, spot.x_ends) for spot in spots]),
        interval_limits([(spot.y, spot.y_ends) for spot in spots]),
        round_y=False,
        top=26.0,
        size=(width, height),
        names=(title, x_label, y_label),
    )
    x_of, y_of, parts = frame.x_of, frame.y_of, frame.parts
    if stairs:
        corners = [(frame.x_range[lower[0]], stairs[0][1])]
        last = (0.0, frame.y_range[lower[1]])
        for (x, y), (_, below) in zip(stairs, [*stairs[1:], last], strict=True):
            corners += [(x, y), (x, below)]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in corners)
        parts.append(f'<polyline class="stairs" points="{path}"/>')
    for spot in spots:
        x, y = x_of(spot.x), y_of(spot.y)
        x_ends, y_ends = _cut(spot.x_ends, frame.x_range), _cut(spot.y_ends, frame.y_range)
        bars = [(x_of(end), y) for end in x_ends], [(x, y_of(end)) for end in y_ends]
        for (x1, y1), (x2, y2) in (bar for bar in bars if bar):
            parts.append(
                f'<line class="error {spot.style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" '
                f'y2="{y2:.1f}"/>'
            )
        shape = (
            f'<circle class="spot {spot.style}" cx="{x:.1f}" cy="{y:.1f}" r="6">'
            if spot.round
            else f'<path class="spot {spot.style}" d="M{x - 8:.1f} {y:.1f}l8-8 8 8-8 8z">'
        )
        name = f"<title>{html.escape(spot.name)}</title>"
        parts.append(shape + name + ("</circle>" if spot.round else "</path>"))
        if spot.mark:
            parts.append(_text(x + 10, y - 8, spot.mark, "start", "label"))
    return "".join(parts) + "</svg>"


def interval_bars(
    rows: Sequence[tuple[str, float, tuple[float, float] | None]],
    *,
    title: str,
    unit: str = "",
    limits: tuple[float, float] | None = None,
    width: int = 460,
) -> str:
    """Returns horizontal bars from zero with their intervals, or "" without rows.

    Args:
      rows: name, value, and the ends of its interval if it has one.
      title: read by screen readers and shown on hovering.
      unit: written behind every value.
      limits: values at both ends, so that several charts can be compared; `interval_limits` of
        the rows by default. Intervals are cut there.
      width: units of the drawing; one unit is one pixel at natural size.
    """
    if not rows:
        return ""
    low, high = limits or interval_limits([(0.0, None), *(row[1:] for row in rows)])
    height = 40 * len(rows) + 6

    def x_of(value: float) -> float:
        return 4 + (value - low) / (high - low) * (width - 8)

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title)}"><title>{html.escape(title)}</title>'
    ]
    for index, (name, value, pair) in enumerate(rows):
        y = 40 * index + 14
        text = f"{value:+.1f}{unit}" + (f" ({pair[0]:+.1f} to {pair[1]:+.1f})" if pair else "")
        parts.append(_text(4, y, name, "start", "label"))
        parts.append(_text(width - 4, y, text, "end", "label"))
        left, right = sorted((x_of(0.0), x_of(value)))
        parts.append(
            f'<rect class="{"gain" if value >= 0 else "loss"}" x="{left:.1f}" y="{y + 5}" '
            f'width="{max(right - left, 0.5):.1f}" height="12"/>'
        )
        if pair:
            x1, x2 = map(x_of, _cut(pair, (low, high)))
            parts.append(
                f'<line class="error" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y + 11}" y2="{y + 11}"/>'
            )
        zero = x_of(0.0)  # a line beside the bars alone would cross the text
        parts.append(
            f'<line class="axis" x1="{zero:.1f}" x2="{zero:.1f}" y1="{y + 3}" y2="{y + 19}"/>'
        )
    return "".join(parts) + "</svg>"


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Axes of a chart: from values to units of the drawing, and the parts drawn so far."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: float
    right: float
    top: float
    bottom: float
    parts: list[str]

    def x_of(self, x: float) -> float:
        low, high = self.x_range
        return self.left + (x - low) / ((high - low) or 1) * (self.right - self.left)

    def y_of(self, y: float) -> float:
        low, high = self.y_range
        return self.bottom - (y - low) / ((high - low) or 1) * (self.bottom - self.top)


def _frame(
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    *,
    round_y: bool,
    top: float,
    size: tuple[int, int],
    names: tuple[str, str, str],
) -> _Frame:
    """Opens a drawing with its axes, grid and labels.

    Args:
      x_range: values at the left and right end.
      y_range: values at the bottom and top.
      round_y: let the vertical axis run from one round number to another.
      top: where the plot begins; above it stand the label and the legend.
      size: width and height.
      names: the title, and the labels of both axes.
    """
    width, height = size
    title, x_label, y_label = html.escape(names[0]), *names[1:]
    (x_low, x_high), (y_low, y_high) = x_range, y_range
    y_ticks = ticks(y_low, y_high, max(2, height // 55))
    if round_y and len(y_ticks) > 1:
        step = y_ticks[1] - y_ticks[0]
        y_low, y_high = math.floor(y_low / step) * step, math.ceil(y_high / step) * step
        y_ticks = ticks(y_low, y_high, round((y_high - y_low) / step))
    left = 12 + 7.5 * max(len(_number(tick)) for tick in y_ticks)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
        f"<title>{title}</title>"
    ]
    frame = _Frame((x_low, x_high), (y_low, y_high), left, width - 16.0, top, height - 40.0, parts)
    bottom = frame.bottom
    parts += [_level(left, frame.right, frame.y_of(tick), _number(tick)) for tick in y_ticks]
    for tick in ticks(x_low, x_high, max(2, width // 90)):
        parts.append(_mark(frame.x_of(tick), bottom, _number(tick), width))
    parts.append(
        f'<line class="axis" x1="{left:.1f}" x2="{frame.right:.1f}" y1="{bottom:.1f}" '
        f'y2="{bottom:.1f}"/>'
    )
    middle = (left + frame.right) / 2
    parts.append(_text(middle, height - 6, x_label, "middle", "label"))
    parts.append(_text(4, 13, y_label, "start", "label"))
    return frame


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
    quartiles: tuple[float, float] | None = None,
    names: Sequence[str] = (),
    width: int = 220,
) -> str:
    """Returns a strip with a dot for each prompt, a bar at the median and ticks for baselines.

    Args:
      values: one value per prompt.
      low: value at the left end.
      high: value at the right end.
      median: drawn as a bar.
      marks: baselines as (CSS class, value).
      quartiles: drawn as a band behind the dots.
      names: of the prompts, shown on hovering.
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
    if quartiles:
        x, end = map(x_of, quartiles)
        parts.append(
            f'<rect class="quartiles" x="{x:.1f}" y="8" width="{end - x:.1f}" height="10"/>'
        )
    for style, value in marks:
        x = x_of(value)
        parts.append(
            f'<line class="{style}" x1="{x:.1f}" x2="{x:.1f}" y1="3" y2="23">'
            f"<title>{style} {value:g}</title></line>"
        )
    titles = [f"<title>{html.escape(name)}</title>" for name in names] or [""] * len(values)
    parts += [
        f'<circle class="dot" cx="{x_of(value):.1f}" cy="13" r="4">{title}</circle>'
        for value, title in zip(values, titles, strict=True)
    ]
    x = x_of(median)
    parts.append(f'<line class="median" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="22"/></svg>')
    return "".join(parts)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def interval_limits(
    values: Sequence[tuple[float, tuple[float, float] | None]],
) -> tuple[float, float]:
    """Returns the ends of an axis for values with intervals (or None).

    An interval stretches the axis to at most three times what the values need, so that one seed
    too few does not press all values into one spot; what is longer is cut by the charts.
    """
    low, high = min(value for value, _ in values), max(value for value, _ in values)
    ends = [end for _, pair in values if pair for end in pair]
    first, last = _limits([low, high, *ends])
    if high > low:
        first, last = max(first, low - (high - low)), min(last, high + (high - low))
    margin = 0.08 * (last - first)  # so that marks at the ends are whole
    return first - margin, last + margin


def _cut(pair: tuple[float, float] | None, limits: tuple[float, float]) -> list[float]:
    """The ends of an interval within an axis; none of one that is not there."""
    return [min(max(end, limits[0]), limits[1]) for end in pair or ()]


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

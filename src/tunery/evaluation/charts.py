"""Charts as inline SVG text. Pure functions: numbers in, one <svg> element out; no script, no file, no network.

Colours come from the page's CSS variables (--series-1, --series-2, --ink, --muted, --line), so one chart serves a light
page, a dark one and paper. Series differ by dash and marker too, never by colour alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

MOST_POINTS = 600
_DASHES = ("", "6 4", "2 3")


@dataclass(frozen=True, slots=True)
class Series:
    """One curve.

    Attributes:
        name: for the legend.
        points: (x, y), by rising x. Points that are not finite are left out.
        color: 1 to 4, the page's --series-N.
        style: line; faint (thin and pale, for raw values behind a smoothed curve); dots (a line with a dot per point).
    """

    name: str
    points: Sequence[Point]
    color: int = 1
    style: str = "line"


@dataclass(frozen=True, slots=True)
class Interval:
    """One row of `interval_chart`: a value and the range in which the truth plausibly lies."""

    name: str
    value: float
    low: float
    high: float
    color: int = 1


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that cover `low` to `high`."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return [0.0, 1.0]
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if raw <= factor * power * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten with their 2 and 5 that cover `low` to `high` (both positive); powers alone if there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    below = max((tick for tick in ticks if tick <= low), default=ticks[0])
    above = min((tick for tick in ticks if tick >= high), default=ticks[-1])
    return [tick for tick in ticks if below <= tick <= above]


def tick_label(value: float) -> str:
    """A short number: 0.25, 1,500, 2e-05."""
    if value == 0:
        return "0"
    if abs(value) < 1e-2 or abs(value) >= 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def smooth(points: Sequence[Point], reach: int | None = None) -> list[Point]:
    """Centred moving average of y: it does not lag behind a falling curve, as an exponential average would.

    Args:
        points: (x, y) by rising x.
        reach: points averaged on either side, fewer towards the ends; left out, a fortieth of all, at least 3.
    """
    reach = max(3, len(points) // 40) if reach is None else reach
    sums = list(itertools.accumulate((y for _, y in points), initial=0.0))
    smoothed: list[Point] = []
    for index, (x, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)
        smoothed.append((x, (sums[index + near + 1] - sums[index - near]) / (2 * near + 1)))
    return smoothed


def thin(points: Sequence[Point], limit: int = MOST_POINTS) -> list[Point]:
    """At most `limit` points that look the same: the lowest and highest of each stretch, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    stretches = max(limit // 2, 1)
    kept: list[Point] = []
    for index in range(stretches):
        part = points[index * len(points) // stretches : (index + 1) * len(points) // stretches]
        ends = {min(range(len(part)), key=lambda i: part[i][1]), max(range(len(part)), key=lambda i: part[i][1])}
        kept += [part[i] for i in sorted(ends)]
    return kept


@dataclass(frozen=True, slots=True)
class _Axis:
    """Maps values to pixels; `start` and `end` are the pixels of the first and the last tick."""

    ticks: Sequence[float]
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def _text(x: float, y: float, content: str, kind: str = "tick", anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(content)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'


def _svg(title: str, width: float, height: float, parts: Sequence[str], kind: str = "chart") -> str:
    return (
        f'<svg class="{escape(kind)}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )


def _finite(series: Series, log_y: bool) -> list[Point]:
    return [(x, y) for x, y in series.points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]


def _curve(series: Series, points: Sequence[Point], x_axis: _Axis, y_axis: _Axis) -> str:
    color = f"var(--series-{series.color},currentColor)"
    shown = points if series.style == "dots" and len(points) <= 60 else thin(points)
    places = [(x_axis(x), y_axis(y)) for x, y in shown]
    path = " ".join(f"{x:g},{y:g}" for x, y in places)
    if series.style == "faint":
        stroke = f"stroke:{color};stroke-width:1;stroke-opacity:.35"
    else:
        dash = _DASHES[(series.color - 1) % len(_DASHES)] if series.style == "line" else ""
        stroke = f"stroke:{color};stroke-width:2.25" + (f";stroke-dasharray:{dash}" if dash else "")
    drawn = f'<polyline fill="none" stroke-linejoin="round" stroke-linecap="round" style="{stroke}" points="{path}"/>'
    if series.style != "dots" and len(places) > 1:
        return drawn
    dots = "".join(
        f'<circle cx="{x:g}" cy="{y:g}" r="4" style="fill:{color};stroke:var(--surface,#fff);stroke-width:1.5">'
        f"<title>{escape(series.name)}, {tick_label(px)}: {py:.4g}</title></circle>"
        for (x, y), (px, py) in zip(places, shown, strict=True)
    )
    return drawn + dots


def _legend(series: Sequence[Series], left: float, width: float) -> tuple[str, float]:
    """The legend's elements and the height they take; entries wrap at `width`."""
    parts: list[str] = []
    x, y = left, 14.0
    for one in series:
        wide = 34 + 7.0 * len(one.name)
        if x > left and x + wide > width:
            x, y = left, y + 18
        parts.append(_curve(one, [(0, 0), (1, 0)], _Axis((0, 1), x, x + 22), _Axis((-1, 1), y, y - 8)))
        parts.append(_text(x + 28, y, one.name, "legend", "start"))
        x += wide + 14
    return "".join(parts), y + 14


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "",
    width: int = 720,
    height: int = 300,
    log_y: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    kind: str = "chart",
) -> str:
    """A chart of curves with axes, round ticks, grid lines and (from two curves on) a legend.

    Args:
        series: the curves; empty ones are left out.
        title: read out by screen readers, and shown when the pointer rests on the chart.
        x_label: under the axis.
        width, height: of the view box, in pixels; the page scales it.
        log_y: logarithmic y axis; values that are not positive are left out.
        marks: (x, label) of vertical lines.
        kind: the element's CSS class.

    Returns:
        An <svg> element; all text in it is escaped. Without any point it says "no data".
    """
    drawn = [(one, points) for one in series if (points := _finite(one, log_y))]
    if not drawn:
        return _svg(title, width, 60, [_text(width / 2, 34, "no data")], kind)
    ys = [y for _, points in drawn for _, y in points]
    xs = [x for _, points in drawn for x, _ in points]
    count = max(2, height // 60)
    y_ticks = log_ticks(min(ys), max(ys)) if log_y else nice_ticks(min(ys), max(ys), count)
    if len(y_ticks) < 2:
        y_ticks, log_y = nice_ticks(min(ys), max(ys), count), False
    labels = [tick_label(tick) for tick in y_ticks]
    left, right = 14 + 7.2 * max(map(len, labels)), 14
    legend, top = _legend([one for one, _ in drawn], left, width - right) if len(drawn) > 1 else ("", 12.0)
    top += 14 if marks else 0
    bottom = 44 if x_label else 26
    y_axis = _Axis(y_ticks, height - bottom, top, log_y)
    low_x, high_x = min(xs), max(xs)
    x_axis = _Axis((low_x, high_x), left + 2, width - right)
    x_ticks = [tick for tick in nice_ticks(low_x, high_x, max(3, width // 110)) if low_x <= tick <= high_x]

    parts = [legend]
    for tick, label in zip(y_ticks, labels, strict=True):
        parts.append(_line(left, y_axis(tick), width - right, y_axis(tick), "grid"))
        parts.append(_text(left - 8, y_axis(tick) + 4, label, anchor="end"))
    for tick in x_ticks:
        parts.append(_line(x_axis(tick), height - bottom, x_axis(tick), height - bottom + 5, "axis"))
        parts.append(_text(x_axis(tick), height - bottom + 18, tick_label(tick)))
    parts.append(_line(left, height - bottom, width - right, height - bottom, "axis"))
    if x_label:
        parts.append(_text((left + width - right) / 2, height - 6, x_label))
    for x, label in marks:
        at = x_axis(min(max(x, low_x), high_x))
        anchor = "end" if at > width * 0.75 else "start" if at < width * 0.25 else "middle"
        parts.append(_line(at, top, at, height - bottom, "mark"))
        parts.append(_text(at, top - 5, label, "legend", anchor))
    parts += [_curve(one, points, x_axis, y_axis) for one, points in drawn]
    return _svg(title, width, height, parts, kind)


def interval_chart(
    rows: Sequence[Interval], *, title: str, low: float = 0.0, high: float = 1.0, width: int = 720, kind: str = "chart"
) -> str:
    """One horizontal bar of uncertainty a row, with a dot at the value, over an axis in percent.

    Args:
        rows: values as shares (0.5 is 50 %).
        title: read out by screen readers.
        low, high: ends of the axis, as shares.
        width: of the view box, in pixels.
        kind: the element's CSS class.
    """
    left, right, top, pitch = 20 + 7.5 * max((len(row.name) for row in rows), default=0), 64, 6, 34
    bottom = top + pitch * len(rows)
    ticks = [tick for tick in nice_ticks(low, high, max(3, width // 130)) if low - 1e-9 <= tick <= high + 1e-9]
    axis = _Axis((low, high), left, width - right)
    parts: list[str] = []
    for tick in ticks:
        parts.append(_line(axis(tick), top, axis(tick), bottom, "grid"))
        parts.append(_text(axis(tick), bottom + 17, f"{tick:.0%}"))
    for index, row in enumerate(rows):
        y = top + pitch * (index + 0.5)
        color = f"var(--series-{row.color},currentColor)"
        parts.append(_text(left - 12, y + 4, row.name, "legend", "end"))
        parts.append(
            f'<line x1="{axis(row.low):g}" y1="{y:g}" x2="{axis(row.high):g}" y2="{y:g}" stroke-linecap="round" '
            f'style="stroke:{color};stroke-width:9;stroke-opacity:.32"/>'
            f'<circle cx="{axis(row.value):g}" cy="{y:g}" r="6" style="fill:{color}"><title>{escape(row.name)}: '
            f"{row.value:.1%} ({row.low:.1%} to {row.high:.1%})</title></circle>"
        )
        parts.append(_text(max(axis(row.high), axis(row.value) + 6) + 10, y + 4, f"{row.value:.1%}", "legend", "start"))
    return _svg(title, width, bottom + 26, parts, kind)

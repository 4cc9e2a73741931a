"""The plots of the page as inline SVG: colours are the page's CSS variables, so they follow light, dark and print; text is escaped.

Marks differ in shape as well as in colour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_TEXT = 12
_ROW = 24


@dataclass(frozen=True)
class Interval:
    """A value with its interval, both in the plot's unit; nan bounds draw none."""

    name: str
    value: float
    low: float
    high: float
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A series over shared positions.

    Args:
        kind: `before` or `after`: its colour and mark.
        values: None leaves a gap.
    """

    name: str
    kind: str
    values: Sequence[float | None]


def intervals(rows: Sequence[Interval], *, title: str, unit: str, width: int = 640, label_width: int = 190) -> Markup:
    """Values with their intervals, one row each, against a line at zero."""
    bounds = [bound for row in rows for bound in (row.value, row.low, row.high) if math.isfinite(bound)]
    ticks = ticks_between(min([0.0, *bounds]), max([0.0, *bounds]))
    left, right = label_width, width - 96
    height = _ROW * len(rows) + 44

    def x(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left)

    parts = [rule(x(tick), 4, x(tick), height - 38, zero=tick == 0) for tick in ticks]
    parts += [label(x(tick), height - 22, tick_text(tick, ticks), "middle") for tick in ticks]
    parts.append(label((left + right) / 2, height - 5, unit, "middle", "dim"))
    for index, row in enumerate(rows):
        y = _ROW * index + 16
        kind = "worse" if row.low > 0 else "better" if row.high < 0 else "even"
        parts.append(label(left - 10, y + 4, row.name, "end"))
        if math.isfinite(row.low):
            parts.append(
                Markup('<line class="{}" x1="{:.1f}" y1="{}" x2="{:.1f}" y2="{}"/>').format(kind, x(row.low), y, x(row.high), y)
            )
        parts.append(mark(kind, x(row.value), y))
        parts.append(label(right + 10, y + 4, row.note, "start", "dim"))
    return figure(title, width, height, parts)


def lines(
    names: Sequence[str], series: Sequence[Line], *, title: str, x_title: str, y_title: str, width: int = 640, height: int = 260
) -> Markup:
    """Series over named positions, from zero or from near the lowest value."""
    values = [value for line in series for value in line.values if value is not None]
    ticks = ticks_between(min(values), max(values))
    left, right, top, bottom = 56, width - 14, 26, height - 46

    def x(index: int) -> float:
        return left + (right - left) * (index + 0.5) / len(names)

    def y(value: float) -> float:
        return bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    parts = [rule(left, y(tick), right, y(tick), zero=False) for tick in ticks]
    parts += [label(left - 8, y(tick) + 4, tick_text(tick, ticks), "end") for tick in ticks]
    parts += [label(x(index), bottom + 16, name, "middle") for index, name in enumerate(names)]
    parts.append(label((left + right) / 2, height - 8, x_title, "middle", "dim"))
    parts.append(label(4, 12, y_title, "start", "dim"))
    for line in series:
        points = [(x(index), y(value)) for index, value in enumerate(line.values) if value is not None]
        parts.append(path(line.kind, points))
        parts += [mark(line.kind, *point) for point in points]
    return figure(title, width, height, [*parts, *_legend(series, right)])


def reliability(
    before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]], *, title: str, size: int = 300
) -> Markup:
    """Share of hits against confidence, with the diagonal of perfect calibration."""
    left, right, top, bottom = 44, size - 12, 26, size - 46

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return left + point[0] * (right - left), bottom - point[1] * (bottom - top)

    parts = []
    for tick in (0.0, 0.5, 1.0):
        (tick_x, _), (_, tick_y) = at((tick, 0)), at((0, tick))
        parts += [rule(tick_x, top, tick_x, bottom, zero=False), rule(left, tick_y, right, tick_y, zero=False)]
        parts += [label(tick_x, bottom + 16, f"{tick:.0%}", "middle"), label(left - 6, tick_y + 4, f"{tick:.0%}", "end")]
    parts.append(rule(*at((0, 0)), *at((1, 1)), zero=True))
    series = (Line("before", "before", ()), Line("after", "after", ()))
    for line, points in zip(series, (before, after), strict=True):
        drawn = [at(point) for point in points]
        parts.append(path(line.kind, drawn))
        parts += [mark(line.kind, *point) for point in drawn]
    parts.append(label((left + right) / 2, size - 8, "confidence in the top token", "middle", "dim"))
    parts.append(label(4, 12, "how often it is right", "start", "dim"))
    return figure(title, size, size, [*parts, *_legend(series, right)])


def bars(
    rows: Sequence[tuple[str, float | None, str]], *, title: str, unit: str, width: int = 480, label_width: int = 100
) -> Markup:
    """Bars from zero: name, value, and what is written behind; None draws none."""
    ticks = ticks_between(0.0, max([1e-12, *(value for _, value, _ in rows if value is not None)]))
    left, right, height = label_width, width - 60, _ROW * len(rows) + 44

    def x(value: float) -> float:
        return left + value / ticks[-1] * (right - left)

    parts = [rule(x(tick), 4, x(tick), height - 38, zero=tick == 0) for tick in ticks]
    parts += [label(x(tick), height - 22, tick_text(tick, ticks), "middle") for tick in ticks]
    parts.append(label((left + right) / 2, height - 5, unit, "middle", "dim"))
    for index, (name, value, note) in enumerate(rows):
        y = _ROW * index + 16
        parts.append(label(left - 8, y + 4, name, "end"))
        if value is not None:
            parts.append(
                Markup('<rect class="bar" x="{}" y="{}" width="{:.1f}" height="12"/>').format(left, y - 6, x(value) - left)
            )
            parts.append(label(x(value) + 6, y + 4, note, "start", "dim"))
    return figure(title, width, height, parts)


def ticks_between(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that enclose a range, at least two and about `most`."""
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """A tick with the decimals that tell it from its neighbours."""
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return f"{value:.{min(decimals + (round((ticks[1] - ticks[0]) * 10**decimals, 6) % 1 > 0), 12)}f}"


def figure(title: str, width: int, height: int, parts: Sequence[Markup]) -> Markup:
    """A plot of these parts, which a reader who cannot see it is told the title of."""
    body = Markup("").join(parts)
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}" style="max-width:{}px">').format(width, height, title, width)
    return head + Markup("<title>{}</title>").format(title) + body + Markup("</svg>")


def label(x: float, y: float, text: str, anchor: str, kind: str = "") -> Markup:
    """Text; `anchor` is start, middle or end."""
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" font-size="{}" text-anchor="{}">{}</text>').format(
        kind, x, y, _TEXT, anchor, escape(text)
    )


def rule(x1: float, y1: float, x2: float, y2: float, *, zero: bool) -> Markup:
    """A line of the grid, or the one at zero."""
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        "zero" if zero else "grid", x1, y1, x2, y2
    )


def path(kind: str, points: Sequence[tuple[float, float]]) -> Markup:
    """A line through points, in the colour of its kind."""
    return Markup('<polyline class="{}" points="{}"/>').format(kind, " ".join(f"{x:.1f},{y:.1f}" for x, y in points))


def mark(kind: str, x: float, y: float) -> Markup:
    """A square for what is after or worse, a circle for the rest."""
    if kind in ("after", "worse"):
        return Markup('<rect class="mark {}" x="{:.1f}" y="{:.1f}" width="8" height="8"/>').format(kind, x - 4, y - 4)
    return Markup('<circle class="mark {}" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(kind, x, y)


def _legend(series: Sequence[Line], right: float) -> list[Markup]:
    parts, x = [], right
    for line in reversed(series):
        x -= 7 * len(line.name) + 26
        parts += [mark(line.kind, x + 6, 8), label(x + 16, 12, line.name, "start")]
    return parts

"""Plots of numbers against numbers as inline SVG: several series, told apart by colour and by the shape of their marks.

Axes are linear, logarithmic or a row of names. Every mark can say what it is when it is pointed at.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from mlx_forget.pages.svg import figure, label, path, rule, tick_text, ticks_between

# Classes of the skeleton's colours, in order; each goes with a shape.
HUES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
_SHAPES: tuple[Sequence[tuple[float, float]], ...] = (
    [],
    [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    [(0, -1.25), (1.2, 0.95), (-1.2, 0.95)],
    [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
    [(0, 1.25), (1.2, -0.95), (-1.2, -0.95)],
    [
        (-0.4, -1.2),
        (0.4, -1.2),
        (0.4, -0.4),
        (1.2, -0.4),
        (1.2, 0.4),
        (0.4, 0.4),
        (0.4, 1.2),
        (-0.4, 1.2),
        (-0.4, 0.4),
        (-1.2, 0.4),
        (-1.2, -0.4),
        (-0.4, -0.4),
    ],
    [(0, -1.4), (0.45, -0.45), (1.4, 0), (0.45, 0.45), (0, 1.4), (-0.45, 0.45), (-1.4, 0), (-0.45, -0.45)],
)
# Width of a letter of the plots' text, roughly.
_LETTER = 6.4
_SIZE = 3.6


@dataclass(frozen=True)
class Point:
    """A measurement.

    Args:
        note: what it is, shown when it is pointed at.
        ring: it is the one that is read, such as a minimum.
    """

    x: float
    y: float
    note: str = ""
    ring: bool = False


@dataclass(frozen=True)
class Series:
    """Points of one colour and shape.

    Args:
        line: what to draw through them: its corners; empty draws none.
        dashed: the line is a law's, not a measurement's.
        band: (x, low, high) of an interval behind it.
    """

    name: str
    points: Sequence[Point] = ()
    line: Sequence[tuple[float, float]] = ()
    dashed: bool = False
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Axis:
    """An axis.

    Args:
        title: with its unit.
        log: logarithmic; all values are positive.
        names: values stand at the places 0, 1, ... and are called so.
        show: how a tick is written; default: with the decimals it needs.
        reach: values that the axis reaches though nothing is drawn there.
    """

    title: str
    log: bool = False
    names: Sequence[str] = field(default=())
    show: Callable[[float], str] | None = None
    reach: Sequence[float] = field(default=())


def chart(
    series: Sequence[Series], *, x: Axis, y: Axis, title: str, width: int = 520, height: int = 300, level: float | None = None
) -> Markup:
    """A plot with a legend below; `level` draws a line across, such as what nothing forgotten would be.

    Series beyond the seventh repeat colours and shapes.
    """
    xs = [p.x for s in series for p in s.points] + [corner[0] for s in series for corner in s.line]
    ys = [p.y for s in series for p in s.points] + [corner[1] for s in series for corner in s.line]
    ys += [end for s in series for _, *ends in s.band for end in ends if math.isfinite(end)] + ([] if level is None else [level])
    left, right, top = 62.0, width - 16.0, 26.0
    rows = _legend_rows([one.name for one in series], right - left) if len(series) > 1 else []
    bottom = height - 44.0
    at_x, x_ticks = _scale(xs, x, left, right)
    at_y, y_ticks = _scale(ys, y, bottom, top)
    parts = [rule(left, at_y(tick), right, at_y(tick), zero=False) for tick, _ in y_ticks]
    parts += [rule(at_x(tick), top, at_x(tick), bottom, zero=False) for tick, _ in x_ticks]
    parts += [label(left - 8, at_y(tick) + 4, text, "end") for tick, text in y_ticks]
    parts += [label(at_x(tick), bottom + 16, text, "middle") for tick, text in x_ticks]
    parts.append(label((left + right) / 2, height - 10, x.title, "middle", "dim"))
    parts.append(label(4, 12, y.title, "start", "dim"))
    if level is not None:
        parts.append(rule(left, at_y(level), right, at_y(level), zero=True))
    for number, one in enumerate(series):
        parts += _drawn(one, number % len(HUES), at_x, at_y)
    total = height + 18 * len(rows)
    for place, row in enumerate(rows):
        offset = left
        for number in row:
            y_row = height + 18 * place + 4
            one, hue = series[number], number % len(HUES)
            kind = f"{HUES[hue]} dashed" if one.dashed else HUES[hue]
            parts.append(
                _shape(hue, offset + 5, y_row, "") if one.points else path(kind, [(offset - 4, y_row), (offset + 12, y_row)])
            )
            parts.append(label(offset + 15, y_row + 4, series[number].name, "start"))
            offset += 30 + _LETTER * len(series[number].name)
    return figure(title, width, total, parts)


def _drawn(one: Series, hue: int, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> list[Markup]:
    parts = []
    band = [corner for corner in one.band if all(math.isfinite(value) for value in corner)]
    if band:
        edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        corners = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in edge)
        parts.append(Markup('<polygon class="band {}" points="{}"/>').format(HUES[hue], corners))
    if one.line:
        kind = f"{HUES[hue]} dashed" if one.dashed else HUES[hue]
        parts.append(path(kind, [(at_x(x), at_y(y)) for x, y in one.line]))
    for point in one.points:
        x, y = at_x(point.x), at_y(point.y)
        parts.append(_shape(hue, x, y, point.note))
        if point.ring:
            parts.append(Markup('<circle class="ring" cx="{:.1f}" cy="{:.1f}" r="7.5"/>').format(x, y))
    return parts


def _shape(hue: int, x: float, y: float, note: str) -> Markup:
    said = Markup("<title>{}</title>").format(note) if note else Markup("")
    if not _SHAPES[hue]:
        return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}">{}</circle>').format(HUES[hue], x, y, _SIZE, said)
    corners = " ".join(f"{x + _SIZE * dx:.1f},{y + _SIZE * dy:.1f}" for dx, dy in _SHAPES[hue])
    return Markup('<polygon class="{}" points="{}">{}</polygon>').format(HUES[hue], corners, said)


def _scale(
    values: Sequence[float], axis: Axis, start: float, end: float
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """The place of a value between two ends, and the ticks with their texts."""
    if axis.names:
        step = (end - start) / len(axis.names)
        return lambda value: start + step * (value + 0.5), list(enumerate(axis.names))
    low, high = min((*values, *axis.reach)), max((*values, *axis.reach))
    if axis.log:
        ticks = log_ticks(low, high)
        span = (min(math.log(low), math.log(ticks[0])), max(math.log(high), math.log(ticks[-1])))
        margin = 0.04 * (span[1] - span[0])
        first, last = span[0] - margin, span[1] + margin
        return (
            lambda value: start + (math.log(value) - first) / (last - first) * (end - start),
            [(tick, axis.show(tick) if axis.show else f"{tick:g}") for tick in ticks],
        )
    linear = ticks_between(low, high)
    return (
        lambda value: start + (value - linear[0]) / (linear[-1] - linear[0]) * (end - start),
        [(tick, axis.show(tick) if axis.show else tick_text(tick, linear)) for tick in linear],
    )


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers on a logarithmic axis: at least two of 1, 2, 5 times powers of ten, which reach to the ends or just beyond."""
    assert 0 < low <= high
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        every = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        first = max((tick for tick in every if tick <= low * (1 + 1e-9)), default=every[0])
        last = min((tick for tick in every if tick >= high * (1 - 1e-9)), default=every[-1])
        ticks = [tick for tick in every if first <= tick <= last]
        if 2 <= len(ticks) <= most:
            return ticks
    if len(ticks) < 2:
        return [ticks[0], 2 * ticks[0]]
    return ticks[:: math.ceil(len(ticks) / most)]


def _legend_rows(names: Sequence[str], width: float) -> list[list[int]]:
    """The numbers of the series in each row of the legend."""
    rows: list[list[int]] = [[]]
    used = 0.0
    for number, name in enumerate(names):
        needed = 30 + _LETTER * len(name)
        if rows[-1] and used + needed > width:
            rows.append([])
            used = 0.0
        rows[-1].append(number)
        used += needed
    return rows


def short_count(value: float) -> str:
    """A count as people write it: 656K, 1.28B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:g}"

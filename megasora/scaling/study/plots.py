"""Plots as inline SVG: lines over the number of ranks, stacked bars, a scatter against the diagonal. Every mark has a hover title.

Colours are classes (c0 to c9) of the page's style, so that light and dark are one file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 14.0, 14.0, 44.0
COLOURS = 10
BAR_PX = 26.0
"""Height of one bar and the space below it."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One measured value with its spread."""

    x: float
    y: float
    title: str
    low: float | None = None
    high: float | None = None


Series = Mapping[str, Sequence[Mark]]
"""Name -> marks, ascending in x."""
Scale = Callable[[float], float]
"""From a value to a place in the picture."""


def lines(series: Series, *, x_label: str, y_label: str, ideal: float | None = None, percent: bool = False) -> str:
    """Lines over a logarithmic x axis (ranks), y from 0; whiskers from low to high.

    Args:
        series: not empty.
        x_label: below the axis.
        y_label: beside it.
        ideal: a dashed line at this height.
        percent: y is a share.
    """
    marks = [mark for found in series.values() for mark in found]
    positions = sorted({mark.x for mark in marks})
    low, high = math.log2(positions[0]), math.log2(positions[-1])
    top = max([*(mark.high or mark.y for mark in marks), ideal or 0.0]) * 1.05 or 1.0

    def x(value: float) -> float:
        share = (math.log2(value) - low) / (high - low) if high > low else 0.5
        return LEFT + 12 + share * (WIDTH - LEFT - RIGHT - 24)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)

    parts = [_y_axis(top, y, y_label, percent=percent), _x_labels({p: x(p) for p in positions}, x_label)]
    if ideal is not None:
        parts.append(f'<line class="ideal" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(ideal):.1f}" y2="{y(ideal):.1f}"/>')
    for number, found in enumerate(series.values()):
        colour = f"c{number % COLOURS}"
        shift = (number - (len(series) - 1) / 2) * 3  # whiskers of one x beside each other
        parts.append(_line(found, colour, _shifted(x, shift), y))
    return _svg(parts, HEIGHT, f"{y_label} over {x_label}")


def _shifted(scale: Scale, by: float) -> Scale:
    return lambda value: scale(value) + by


def _line(marks: Sequence[Mark], colour: str, x: Scale, y: Scale) -> str:
    points = " ".join(f"{x(mark.x):.1f},{y(mark.y):.1f}" for mark in marks)
    parts = [f'<polyline class="{colour} line" points="{points}"/>'] if len(marks) > 1 else []
    for mark in marks:
        at = x(mark.x)
        if mark.low is not None and mark.high is not None:
            parts.append(f'<line class="{colour} line" x1="{at:.1f}" x2="{at:.1f}" y1="{y(mark.low):.1f}" y2="{y(mark.high):.1f}"/>')
        parts.append(f'<circle class="{colour} fill" cx="{at:.1f}" cy="{y(mark.y):.1f}" r="4"><title>{escape(mark.title)}</title></circle>')
    return "".join(parts)


def bars(rows: Mapping[str, Mapping[str, float]], *, names: Sequence[str], unit: str, factor: float = 1.0) -> str:
    """Stacked horizontal bars, one a row; parts that no row has get no colour of their own.

    Args:
        rows: label -> part -> value.
        names: parts in the order they are stacked, which gives them their colours.
        unit: of the values times `factor`.
        factor: from values to what is shown.
    """
    left, top = 210.0, max((sum(row.values()) for row in rows.values()), default=1.0) or 1.0
    height = len(rows) * BAR_PX + 28
    scale = (WIDTH - left - RIGHT - 60) / top
    parts = []
    for number, (label, row) in enumerate(rows.items()):
        y, at = number * BAR_PX + 4, left
        parts.append(f'<text class="label" x="{left - 8}" y="{y + 13:.1f}" text-anchor="end">{escape(label)}</text>')
        for name in names:
            width = row.get(name, 0.0) * scale
            if width > 0:
                title = f"{label}: {name.replace('_', ' ')} {row[name] * factor:.4g} {unit}"
                parts.append(
                    f'<rect class="c{names.index(name) % COLOURS} fill" x="{at:.1f}" y="{y:.1f}" width="{width:.2f}" height="18">'
                    f"<title>{escape(title)}</title></rect>"
                )
                at += width
        parts.append(f'<text class="tick" x="{at + 6:.1f}" y="{y + 13:.1f}">{sum(row.values()) * factor:.4g} {escape(unit)}</text>')
    return _svg(parts, height, f"bars in {unit}")


def diagonal(series: Series, *, x_label: str, y_label: str) -> str:
    """Predicted (x) against measured (y) on logarithmic axes; the dashed line is agreement."""
    marks = [mark for found in series.values() for mark in found]
    values = [value for mark in marks for value in (mark.x, mark.y) if value > 0]
    low, high = math.log10(min(values)) - 0.08, math.log10(max(values)) + 0.08

    def x(value: float) -> float:
        return LEFT + (math.log10(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (math.log10(value) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    ticks = log_ticks(10**low, 10**high)
    parts = [_x_labels({tick: x(tick) for tick in ticks}, x_label)]
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(_turned(y_label))
    parts.append(f'<line class="ideal" x1="{x(10**low):.1f}" y1="{y(10**low):.1f}" x2="{x(10**high):.1f}" y2="{y(10**high):.1f}"/>')
    for number, found in enumerate(series.values()):
        parts.append(_line([mark for mark in found if mark.x > 0], f"c{number % COLOURS} dots", x, y))
    return _svg(parts, HEIGHT, f"{y_label} against {x_label}")


def ticks(top: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to at most `top`, about `count` of them."""
    raw = top / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    return [round(step * number, 12) for number in range(int(top / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two values."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for factor in (1, 2, 5) if low <= (tick := float(f"{factor}e{power}")) <= high]


def legend(names: Sequence[str]) -> str:
    """Names with the colours that `lines` and `bars` give them in this order."""
    found = "".join(f'<span><i class="c{number % COLOURS}"></i>{escape(name)}</span>' for number, name in enumerate(names))
    return f'<p class="legend">{found}</p>'


def _y_axis(top: float, y: Scale, label: str, *, percent: bool) -> str:
    parts = [_turned(label)]
    for tick in ticks(top):
        text = f"{tick:.0%}" if percent else human(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{text}</text>')
    return "".join(parts)


def _x_labels(positions: Mapping[float, float], label: str) -> str:
    parts = [
        f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
        for value, at in positions.items()
    ]
    return "".join(parts) + f'<text class="label" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(label)}</text>'


def _turned(label: str) -> str:
    middle = (HEIGHT - BOTTOM + TOP) / 2
    return f'<text class="label" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(label)}</text>'


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def human(value: float) -> str:
    """A number with k, M, G or T where it is large."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"

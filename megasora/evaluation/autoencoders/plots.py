"""Plots of the page as inline SVG. Colours are classes of its style, so that light and dark are one file; marks have hover titles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from megasora.evaluation.autoencoders.latents import EDGES, LatentMoments

DEVIATIONS = 4.0
"""To both sides of a histogram's middle."""
STEP = 0.2
"""Least width of a histogram's step, in deviations."""
Curves = Mapping[str, Sequence[float | None]]


def curves(series: Curves, *, colours: Mapping[str, int]) -> str:
    """PSNR over frames; nothing for a single frame. Frames that are equal leave a gap."""
    longest = max(len(values) for values in series.values())
    finite = [value for values in series.values() for value in values if value is not None]
    if longest < 2 or not finite:
        return ""
    low, high = min(finite), max(finite)
    low, high = (low - 0.5, high + 0.5) if high - low < 1 else (low, high)
    width, height, left, bottom = 420.0, 150.0, 44.0, 28.0

    def x(frame: int) -> float:
        return left + frame / (longest - 1) * (width - left - 8)

    def y(value: float) -> float:
        return 8 + (high - value) / (high - low) * (height - bottom - 8)

    parts = [
        f'<line class="grid" x1="{left}" x2="{width - 8}" y1="{y(at):.1f}" y2="{y(at):.1f}"/>'
        f'<text x="{left - 5}" y="{y(at) + 4:.1f}" text-anchor="end">{at:.1f}</text>'
        for at in (low, (low + high) / 2, high)
    ]
    parts += [f'<text x="{x(at):.1f}" y="{height - 8}" text-anchor="middle">{at + 1}</text>' for at in (0, longest - 1)]
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 8}" text-anchor="middle">frame</text>')
    for name, values in series.items():
        for run in _runs(values):
            points = " ".join(f"{x(frame):.1f},{y(value):.1f}" for frame, value in run)
            parts.append(f'<polyline class="c{colours[name]} line" points="{points}"><title>{escape(name)}</title></polyline>')
    label = "PSNR of each frame, dB"
    return f'<figure class="curve">{_svg(parts, width, height, label)}<figcaption>{label}</figcaption></figure>'


def _runs(values: Sequence[float | None]) -> Iterator[list[tuple[int, float]]]:
    """Stretches without a gap; a stretch of one frame is drawn as a short line."""
    run: list[tuple[int, float]] = []
    for frame, value in enumerate((*values, None)):
        if value is not None:
            run.append((frame, value))
        elif run:
            yield run * 2 if len(run) == 1 else run
            run = []


def channels(means: Sequence[float], stds: Sequence[float]) -> str:
    """Mean and deviation of each channel, side by side."""
    top = max(*(abs(mean) + std for mean, std in zip(means, stds, strict=True)), 1e-12) * 1.05
    width, height, left = 900.0, 170.0, 52.0
    step = (width - left - 8) / len(means)

    def y(value: float) -> float:
        return height / 2 - value / top * (height / 2 - 12)

    parts = [
        f'<line class="grid" x1="{left}" x2="{width - 8}" y1="{y(at):.1f}" y2="{y(at):.1f}"/>'
        f'<text x="{left - 5}" y="{y(at) + 4:.1f}" text-anchor="end">{at:.2g}</text>'
        for at in (-top / 1.05, 0.0, top / 1.05)
    ]
    for channel, (mean, std) in enumerate(zip(means, stds, strict=True)):
        at = left + (channel + 0.5) * step
        bar = max(1.0, step * 0.6)
        title = f"<title>channel {channel}: mean {mean:.4g}, deviation {std:.4g}</title>"
        parts.append(
            f'<rect class="c0 fill soft" x="{at - bar / 2:.1f}" y="{y(mean + std):.1f}" width="{bar:.1f}" '
            f'height="{max(0.5, y(mean - std) - y(mean + std)):.1f}">{title}</rect>'
            f'<circle class="c1 fill" cx="{at:.1f}" cy="{y(mean):.1f}" r="{min(3.0, step / 2):.1f}">{title}</circle>'
        )
    return _svg(parts, width, height, "mean and deviation of each channel")


def histograms(moments: LatentMoments) -> Iterator[str]:
    """One small figure for each channel."""
    for channel, (mean, std) in enumerate(zip(moments.mean.tolist(), moments.std.tolist(), strict=True)):
        path = _outline(moments.histogram[channel], mean=mean, std=std)
        words = f"channel {channel}: mean {mean:.3g}, deviation {std:.3g}"
        drawn = f'<path class="c0 fill" d="{path}"><title>{words}</title></path>' if path else ""
        yield (f"<figure>{_svg([drawn], 100, 40, words)}<figcaption>{channel}<span>{mean:.2g} ± {std:.2g}</span></figcaption></figure>")


def _outline(counts: NDArray[np.int64], *, mean: float, std: float) -> str:
    """Steps of a histogram's density in 100 x 40; empty where nothing varies. Bins narrower than a step are joined: near 0, where they are
    finest, a few values would make a spike."""
    low, high = mean - DEVIATIONS * std, mean + DEVIATIONS * std
    inside = np.flatnonzero((EDGES[1:] > low) & (EDGES[:-1] < high))
    if std <= 0 or not len(inside):
        return ""
    steps: list[tuple[float, float, float]] = []
    start, held = EDGES[inside[0]], 0
    for place in inside:
        held += int(counts[place])
        if EDGES[place + 1] - start >= STEP * std or place == inside[-1]:
            steps.append((start, EDGES[place + 1], held / (EDGES[place + 1] - start)))
            start, held = EDGES[place + 1], 0
    top = max(density for _, _, density in steps) or 1.0
    points = []
    for left, right, density in steps:
        level = 40 - 38 * density / top
        points.append(f"L{_across(left, low, high):.1f} {level:.1f}L{_across(right, low, high):.1f} {level:.1f}")
    return f"M{_across(steps[0][0], low, high):.1f} 40{''.join(points)}L{_across(steps[-1][1], low, high):.1f} 40Z"


def _across(value: float, low: float, high: float) -> float:
    return min(100.0, max(0.0, 100 * (value - low) / (high - low)))


def _svg(parts: Sequence[str], width: float, height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'

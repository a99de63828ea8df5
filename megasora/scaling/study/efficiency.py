"""Strong and weak scaling: what a rank delivers, against a rank of the fewest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megasora.scaling.study.results import PointResult


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """A point in a series."""

    point: PointResult
    scaling: str
    reference: PointResult
    """The point with most tokens/s a rank among those of the fewest ranks of the same size and scaling, of any layout."""
    value: float
    """(tokens/s / ranks) over the reference's; 1 is perfect."""


def rate(point: PointResult) -> float:
    """Tokens/s of a rank; 0 where nothing was measured."""
    return (point.median("tokens_per_s") or 0.0) / point.gpus


def efficiencies(points: Sequence[PointResult]) -> list[Efficiency]:
    """Of every measured point, once for each kind of scaling that it belongs to."""
    found = []
    for size, scaling in sorted({(point.size, scaling) for point in points for scaling in point.scaling}):
        series = [p for p in points if p.size == size and scaling in p.scaling and p.status == "done" and rate(p) > 0]
        if not series:
            continue
        fewest = min(point.gpus for point in series)
        reference = max((point for point in series if point.gpus == fewest), key=rate)
        found += [Efficiency(point=p, scaling=scaling, reference=reference, value=rate(p) / rate(reference)) for p in series]
    return found

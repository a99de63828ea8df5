"""Intervals of a device's timeline: kinds of kernels by their names, and how long at least one of some intervals ran. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KINDS = (
    ("communication", ("nccl",)),
    ("attention", ("flash", "fmha", "sdpa", "attention", "cudnn_generated")),
    ("GEMM", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "gemv", "splitk")),
)
"""Parts of kernels' names, lower case; the first kind that fits. All else is bound by memory: copies, norms, gates, rotations, sums."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One kernel, copy or range; times in microseconds."""

    name: str
    start: float
    stop: float


def kind_of(name: str) -> str:
    """Kind of a kernel by its name."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), "memory-bound")


def busy(intervals: Iterable[Interval]) -> float:
    """Microseconds in which at least one of them ran."""
    return sum(stop - start for start, stop in union(intervals))


def union(intervals: Iterable[Interval]) -> list[tuple[float, float]]:
    """(start, stop) of the time in which at least one of them ran: ascending, apart from each other."""
    found: list[tuple[float, float]] = []
    for interval in sorted(intervals, key=lambda interval: interval.start):
        if found and interval.start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], interval.stop))
        elif interval.stop > interval.start:
            found.append((interval.start, interval.stop))
    return found


def clipped(intervals: Iterable[Interval], *, start: float, stop: float) -> list[Interval]:
    """The parts of intervals that lie between two times."""
    return [
        Interval(name=interval.name, start=max(interval.start, start), stop=min(interval.stop, stop))
        for interval in intervals
        if interval.start < stop and interval.stop > start
    ]


def layered(layers: Sequence[tuple[str, Sequence[Interval]]]) -> dict[str, float]:
    """Microseconds of each layer in which no earlier one ran; layers of one name are added up."""
    result: dict[str, float] = {}
    below: list[Interval] = []
    covered = 0.0
    for name, intervals in layers:
        below = [*below, *intervals]
        reached = busy(below)
        result[name] = result.get(name, 0.0) + reached - covered
        covered = reached
    return result

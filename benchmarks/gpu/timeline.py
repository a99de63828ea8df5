"""Sums up a timeline of a GPU: what ran, by kind, and how long nothing did. It imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from benchmarks.gpu.table import LeftOutError, Row
from megasora.perf.timeline import Interval, busy, kind_of

MOST = 12
"""Kernels named one by one."""


def summarise(intervals: Sequence[Interval], *, steps: int) -> list[Row]:
    """Milliseconds per step and share of the time between the first start and the last stop, by kind; then the longest kernels.

    Kinds are sums of their kernels' times: where kernels overlap the shares add up to more than 1.

    Raises:
        LeftOutError: there is none.
    """
    if not intervals:
        raise LeftOutError("the profiler saw no kernels")
    span = max(interval.stop for interval in intervals) - min(interval.start for interval in intervals)
    kinds: dict[str, float] = dict.fromkeys(["GEMM", "attention", "memory-bound", "communication"], 0.0)
    kernels: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for interval in intervals:
        kind, duration = kind_of(interval.name), interval.stop - interval.start
        kinds[kind] += duration
        for key in (kind, interval.name):
            calls[key] += 1
        kernels[interval.name] += duration
    times = [(kind, kind, time) for kind, time in kinds.items()] + [("launch gaps", "idle between kernels", span - busy(intervals))]
    times += [("all", "first start to last stop", span)]
    times += [(kind_of(name), name, time) for name, time in sorted(kernels.items(), key=lambda item: -item[1])[:MOST]]
    return [
        {"kind": kind, "what": name[:100], "calls_per_step": calls[name] / steps, "ms_per_step": time / 1e3 / steps, "share": time / span}
        for kind, name, time in times
    ]

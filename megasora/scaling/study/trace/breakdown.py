"""Where the time of a step went on a rank: seconds by part, which add up to the step.

Each moment counts once. On a GPU kernels that compute come first: communication counts where it is exposed. On a CPU a rank that is blocked
in a collective computes nothing, so that collectives come first: their operators enclose nothing but the wait. What is left of the time in
`data` and in `save` or `evaluate` counts there, and all else is a gap: nothing ran.

Waiting for a stage's message and its journey cannot be told apart by one receive; the shortest of the rank's trace is taken for the
journey of each, the rest is waiting. The agreement of all ranks at a step's end carries some bytes: its time is waiting too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megasora.perf.ranges import AXES
from megasora.perf.timeline import Interval, busy, clipped, layered
from megasora.scaling.study.predicted import PARTS
from megasora.scaling.study.trace.file import Collective, RankTrace

OTHER = "other"
"""Saves, evaluation and the trace itself within a step."""
COLUMNS = (*PARTS, OTHER)
OUTSIDE = ("save", "evaluate")


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """One step of one rank; seconds."""

    rank: int
    step: int
    seconds: float
    parts: dict[str, float]
    """By `COLUMNS`; they add up to `seconds`."""
    exposed: dict[str, float]
    """Communication that no compute covers, by axis: tp, cp, pp, dp, world."""
    communication: dict[str, float]
    """All communication by axis, covered or not."""


def steps_of(trace: RankTrace) -> list[StepParts]:
    """Every step of a rank's trace."""
    journey = min((c.time.stop - c.time.start for c in trace.collectives if is_arrival(c, trace.device)), default=0.0)
    return [_step(trace, number, time, journey=journey) for number, time in trace.steps]


def is_arrival(collective: Collective, device: str) -> bool:
    """Whether it is the time until a stage's message is there."""
    if collective.axis != "pp":
        return False
    if device == "cuda":
        return True
    return collective.operation == "recv" and collective.time.name.endswith("|wait")


def _step(trace: RankTrace, number: int, time: Interval, *, journey: float) -> StepParts:
    def within(intervals: Sequence[Interval]) -> list[Interval]:
        return clipped(intervals, start=time.start, stop=time.stop)

    computing = [
        ("optimizer", within([work.time for work in trace.work if work.place == "optimizer"])),
        ("data", within([work.time for work in trace.work if work.place == "data"])),
        (OTHER, within([work.time for work in trace.work if work.place in OUTSIDE])),
        ("compute", within([work.time for work in trace.work if work.place not in ("optimizer", "data", *OUTSIDE)])),
    ]
    travelling = [(axis, within([c.time for c in trace.collectives if c.axis == axis])) for axis in AXES]
    waiting = [
        ("data", within([place for place in trace.places if place.name == "data"])),
        (OTHER, within([place for place in trace.places if place.name in OUTSIDE])),
        ("gaps", [time]),
    ]
    found = layered([*computing, *travelling, *waiting] if trace.device == "cuda" else [*travelling, *computing, *waiting])
    exposed: dict[str, float] = {axis: found[axis] / 1e6 for axis in AXES}
    arrivals = sum(1 for c in trace.collectives if is_arrival(c, trace.device) and time.start <= c.time.start < time.stop)
    pipeline = min(exposed["pp"], arrivals * journey / 1e6)
    parts = {
        "compute": found["compute"] / 1e6,
        "tensor_parallel": exposed["tp"],
        "context_parallel": exposed["cp"],
        "pipeline": pipeline,
        "bubble": exposed["pp"] - pipeline + exposed["world"],
        "data_parallel": exposed["dp"],
        "optimizer": found["optimizer"] / 1e6,
        "data": found["data"] / 1e6,
        "gaps": found["gaps"] / 1e6,
        OTHER: found[OTHER] / 1e6,
    }
    return StepParts(
        rank=trace.rank,
        step=number,
        seconds=(time.stop - time.start) / 1e6,
        parts=parts,
        exposed=exposed,
        communication={axis: busy(intervals) / 1e6 for axis, intervals in travelling},
    )

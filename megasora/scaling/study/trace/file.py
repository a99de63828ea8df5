"""A trace file of torch.profiler (Chrome's format) as what a rank did: on a GPU its kernels, on a CPU its operators.

The format: `traceEvents`, each with cat, name, ts and dur in microseconds, pid, tid and args. Kernels (cat kernel, gpu_memcpy, gpu_memset)
have the correlation of the runtime call (cat cuda_runtime or cuda_driver) that launched them, whose time tells in which place of the step;
NCCL's have "Process Group Description" (torch/csrc/distributed/c10d/ParamCommsUtils.hpp, libkineto/src/CuptiActivity.cpp).
"""

from __future__ import annotations

import bisect
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megasora.config.errors import UserError
from megasora.perf.ranges import AXES, COMM, PLACE, STEP, Axis, axis_of
from megasora.perf.timeline import Interval, kind_of

Event = Mapping[str, Any]
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Time in a collective: its kernel, or on a CPU the call or the wait."""

    axis: Axis
    operation: str
    time: Interval


@dataclass(frozen=True, kw_only=True)
class Work:
    """A kernel or an operator that is none, and the place of the step that it belongs to."""

    place: str
    time: Interval


@dataclass(frozen=True, kw_only=True)
class RankTrace:
    """One rank's file."""

    rank: int
    device: Literal["cpu", "cuda"]
    steps: tuple[tuple[int, Interval], ...]
    """(number, time)."""
    places: tuple[Interval, ...]
    """Named as `training.profiling` does: data, forward_backward, agree, optimizer, save, evaluate."""
    work: tuple[Work, ...]
    collectives: tuple[Collective, ...]


def read_trace(path: Path) -> RankTrace:
    """One file, .json or .json.gz.

    Raises:
        UserError: it is no trace, or one of a run that did not name its steps.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        data = json.loads(raw)
        events: list[Event] = [event for event in data["traceEvents"] if event.get("ph") == "X"]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"{path} is no trace of torch.profiler: {type(error).__name__} {error}") from error
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    steps = [event for event in ranges if event["name"].startswith(STEP)]
    if not steps:
        raise UserError(f"{path} names no steps; trace a run with megasora train ... --profile.steps 10:12")
    about = data.get("megasora") or {}
    on_gpu = any(event.get("cat") == "kernel" for event in events)
    places = tuple(_interval(event, PLACE) for event in ranges if event["name"].startswith(PLACE))
    reader = _read_gpu if on_gpu else _read_cpu
    work, collectives = reader(events, places=places, thread=steps[0]["tid"], groups=_groups(data))
    return RankTrace(
        rank=int(about.get("rank", (data.get("distributedInfo") or {}).get("rank", 0))),
        device="cuda" if on_gpu else "cpu",
        steps=tuple((int(event["name"].removeprefix(STEP)), _interval(event, STEP)) for event in steps),
        places=places,
        work=tuple(work),
        collectives=tuple(collectives),
    )


def _groups(data: Mapping[str, Any]) -> dict[str, str]:
    """Name of a process group -> its description."""
    configured = (data.get("distributedInfo") or {}).get("pg_config") or []
    return {str(group.get("pg_name")): str(group.get("pg_desc", "")) for group in configured}


def _interval(event: Event, prefix: str = "") -> Interval:
    start = float(event["ts"])
    return Interval(name=event["name"].removeprefix(prefix), start=start, stop=start + float(event.get("dur", 0.0)))


def _read_cpu(
    events: Sequence[Event], *, places: Sequence[Interval], thread: Any, groups: Mapping[str, str]
) -> tuple[list[Work], list[Collective]]:
    """Operators and named collectives of the thread that trains; what gloo's threads do is a wait there."""
    own = [event for event in events if event["tid"] == thread]
    collectives = []
    for event in own:
        if event["name"].startswith(COMM):
            axis, operation, *_ = event["name"].removeprefix(COMM).split("|")
            collectives.append(Collective(axis=_known(axis), operation=operation, time=_interval(event)))
    where = _Places(places)
    operators = [_interval(event) for event in own if event.get("cat") == "cpu_op" and not event["name"].startswith("c10d::")]
    return [Work(place=where.at(time.start), time=time) for time in _outermost(operators)], collectives


def _read_gpu(
    events: Sequence[Event], *, places: Sequence[Interval], thread: Any, groups: Mapping[str, str]
) -> tuple[list[Work], list[Collective]]:
    """Kernels and copies of all streams."""
    launched = {
        event["args"]["correlation"]: float(event["ts"])
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    where = _Places(places)
    work, collectives = [], []
    for event in events:
        if event.get("cat") not in KERNELS:
            continue
        time, args = _interval(event), event.get("args", {})
        if kind_of(event["name"]) == "communication":
            described = args.get("Process Group Description") or groups.get(str(args.get("Process Group Name")), "")
            operation = str(args.get("Collective name", event["name"]))
            collectives.append(Collective(axis=axis_of(described), operation=operation, time=time))
        else:
            work.append(Work(place=where.at(launched.get(args.get("correlation"), time.start)), time=time))
    return work, collectives


def _known(axis: str) -> Axis:
    return next((known for known in AXES if known == axis), "world")


def _outermost(intervals: Iterable[Interval]) -> list[Interval]:
    """Those that lie in no other: operators call operators."""
    found: list[Interval] = []
    for interval in sorted(intervals, key=lambda interval: (interval.start, -interval.stop)):
        if not found or interval.stop > found[-1].stop:
            found.append(interval)
    return found


class _Places:
    """Finds the place of a time: places follow each other."""

    def __init__(self, places: Sequence[Interval]) -> None:
        self.places = sorted(places, key=lambda place: place.start)
        self.starts = [place.start for place in self.places]

    def at(self, time: float) -> str:
        """Its name; empty between places."""
        number = bisect.bisect_right(self.starts, time) - 1
        return self.places[number].name if number >= 0 and time < self.places[number].stop else ""

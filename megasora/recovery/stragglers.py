"""Which rank or host is slow, and in what.

A step's time is cut where the host stands anyway: waiting for clips, forward and backward, agreeing on the loss (where a fast rank waits
for a slow one), the optimizer. On CUDA the host runs ahead of the device; events recorded at the same places are read one step later,
when they are long done, so that nothing waits for them. Tensor and context parallel ranks meet within forward and backward: there the
group is slow together, and the report names its ranks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, get_args

Part = Literal["data", "compute", "collectives", "optimizer"]
PARTS: tuple[Part, ...] = get_args(Part)
OWN_WORK: tuple[Part, ...] = ("data", "compute", "optimizer")
"""Collectives are where the others wait for the slow one."""


class Mark(Protocol):
    """A point in time that may lie in the future: torch.cuda.Event is one."""

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds from this point to `end`."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Span:
    part: Part
    begin: Mark
    end: Mark

    @property
    def seconds(self) -> float:
        return self.begin.elapsed_time(self.end) / 1000


class StepTimer:
    """Cuts a rank's steps into parts.

    Args:
        record: records a device event now (a torch.cuda.Event after `record()`); None times the host. Waiting for clips is the
            host's anyway.
        clock: monotonic seconds.
    """

    def __init__(self, *, record: Callable[[], Mark] | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._record, self._clock = record, clock
        self._part: Part | None = None
        self._since = 0.0
        self._mark: Mark | None = None
        self._spans: list[_Span] = []
        """Of the running step."""
        self._late: list[_Span] = []
        """Of the step before: the device has passed them when this one ends."""
        self._sums = dict.fromkeys(PARTS, 0.0)
        self._steps = 0

    def enter(self, part: Part | None) -> None:
        """The rank begins a part of a step; None: something else."""
        now = self._clock()
        mark = self._record() if self._record is not None else None
        if self._part is not None:
            if mark is None or self._mark is None or self._part == "data":
                self._sums[self._part] += now - self._since
            else:
                self._spans.append(_Span(part=self._part, begin=self._mark, end=mark))
        self._part, self._since, self._mark = part, now, mark

    def step(self) -> None:
        """A step is done."""
        self.enter(None)
        for span in self._late:
            self._sums[span.part] += span.seconds
        self._late, self._spans = self._spans, []
        self._steps += 1

    def take(self) -> list[float]:
        """Mean seconds of each part of `PARTS` over the steps since the last call."""
        means = [self._sums[part] / max(self._steps, 1) for part in PARTS]
        self._sums, self._steps = dict.fromkeys(PARTS, 0.0), 0
        return means


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank, or all ranks of a host, that the others wait for."""

    ranks: list[int]
    host: str
    part: Part
    seconds: float
    """Mean of a step; of the host's fastest rank where all its ranks are slow."""
    median_s: float
    """Of all ranks."""

    def data(self) -> dict[str, object]:
        """For metrics."""
        return asdict(self)

    def line(self) -> str:
        """For the log."""
        who = f"rank {self.ranks[0]} on {self.host}" if len(self.ranks) == 1 else f"all {len(self.ranks)} ranks of {self.host}"
        times = self.seconds / max(self.median_s, 1e-9)
        return f"slow: {who}, {self.part} {self.seconds:.3f} s a step, {times:.1f} x the median of {self.median_s:.3f} s"


def find_stragglers(
    times: Sequence[Sequence[float]], hosts: Sequence[str], *, factor: float = 1.3, least_share: float = 0.02
) -> list[Straggler]:
    """Ranks that are slow in work of their own, the one that costs most first; a host whose ranks are all slow is one entry.

    Args:
        times: [rank][part of `PARTS`], seconds of a mean step.
        hosts: of each rank.
        factor: slow is more than this times the median of all ranks.
        least_share: and costs at least this share of the median step.
    """
    step = statistics.median(sum(row) for row in times)
    found: list[Straggler] = []
    for part in OWN_WORK:
        column = [row[PARTS.index(part)] for row in times]
        median = statistics.median(column)
        slow = {rank for rank, value in enumerate(column) if value > factor * median and value - median > least_share * step}
        for host in dict.fromkeys(hosts):
            of_host = [rank for rank, name in enumerate(hosts) if name == host]
            together = len(of_host) > 1 and slow.issuperset(of_host)
            for ranks in [of_host] if together else [[rank] for rank in of_host if rank in slow]:
                seconds = min(column[rank] for rank in ranks)
                found.append(Straggler(ranks=ranks, host=host, part=part, seconds=seconds, median_s=median))
    return sorted(found, key=lambda straggler: straggler.median_s - straggler.seconds)

"""Where a run's time went, over all its incarnations.

Rank 0 turns its beats into seconds per kind of work. A step that an earlier incarnation had made already is `redone`: what a death costs
beyond the restart is the steps since the checkpoint, and they are counted where they are paid, in the incarnation that makes them again.
One line an incarnation in recovery/goodput.jsonl, rewritten as the run goes. Seconds are monotonic; only the time between a death and the
next start is a difference of wall clocks, so that a clock that was set is felt there and nowhere else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from megasora.config.files import written_whole
from megasora.recovery.folder import RecoveryFolder
from megasora.recovery.heartbeat import Phase, read_beats

Kind = Literal["productive", "redone", "data", "save", "evaluate", "start"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Incarnation:
    """Time of one start of the run."""

    incarnation: int
    began: float
    """Unix time."""
    updated: float
    """Unix time up to which `seconds` count: the death, to within seconds."""
    closed: bool
    """It ended in order (the last step, or as asked): what follows is no restart."""
    first_step: int | None
    last_step: int
    """Last step finished; 0 when none was."""
    seconds: dict[str, float]
    """Kind -> seconds."""


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Time of a run, in seconds."""

    wall_s: float
    """From the first start to the last beat, with the time between a death and the next start."""
    productive_s: float
    """New steps, without waiting for clips."""
    redone_s: float
    """Steps that had been made before."""
    restarts_s: float
    """From a death to the next step."""
    save_s: float
    evaluate_s: float
    data_s: float
    """Waiting for clips."""
    start_s: float
    """Starts that followed no death."""
    incarnations: int

    @property
    def share(self) -> float:
        """Productive time over all."""
        return self.productive_s / self.wall_s if self.wall_s else 0.0

    def data(self) -> dict[str, float]:
        """For metrics."""
        return {**asdict(self), "share": round(self.share, 4)}


class GoodputMeter:
    """Counts an incarnation's time on rank 0.

    Args:
        folder: the run's recovery folder; must exist.
        incarnation: which start of the run this is.
        every_s: least time between two writes.
        clock: monotonic seconds.
        wall: unix time.
    """

    def __init__(
        self,
        folder: RecoveryFolder,
        incarnation: int,
        *,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._clock, self._wall, self._every_s = folder, clock, wall, every_s
        self._earlier = [record for record in read_incarnations(folder) if record.incarnation < incarnation]
        at_death = [beat.step - 1 for beat in read_beats(folder).values() if beat.incarnation < incarnation]  # later than the record
        self._made_before = max([0, *(record.last_step for record in self._earlier), *at_death])
        self._incarnation = incarnation
        self._began = self._updated = wall()
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._since = self._due = clock()
        self._step, self._phase = 0, "start"
        self._first_step: int | None = None
        self._last_step = 0
        self._closed = False

    def beat(self, step: int, phase: Phase) -> None:
        """Training enters a phase of a step; what passed belongs to the one before."""
        now = self._clock()
        self._account(now)
        if phase != "start" and step != self._step:
            if self._first_step is None and phase == "data":
                self._first_step = step
            self._last_step = max(self._last_step, self._step)
        self._step, self._phase = step, phase
        if now >= self._due:
            self._due = now + self._every_s
            self.write()

    def close(self, *, finished: bool) -> None:
        """The incarnation ends; `finished`: in order, and the step it is at was made."""
        self._closed = finished
        self._account(self._clock())
        if finished:
            self._last_step = max(self._last_step, self._step)
        self.write()

    def write(self) -> None:
        """Write all incarnations; a file that cannot be written is left for the next time."""
        try:
            with written_whole(self._folder.goodput) as temporary:
                temporary.write_text("".join(json.dumps(asdict(record)) + "\n" for record in (*self._earlier, self.now())))
        except OSError:
            return

    def now(self) -> Incarnation:
        """This incarnation so far."""
        return Incarnation(
            incarnation=self._incarnation,
            began=self._began,
            updated=self._updated,
            closed=self._closed,
            first_step=self._first_step,
            last_step=self._last_step,
            seconds={kind: round(seconds, 3) for kind, seconds in self._seconds.items()},
        )

    def total(self) -> Goodput:
        """The run so far."""
        return total([*self._earlier, self.now()])

    def _account(self, now: float) -> None:
        self._seconds[kind_of(self._phase, redone=self._step <= max(self._made_before, self._last_step))] += now - self._since
        self._since, self._updated = now, self._wall()


def kind_of(phase: str, *, redone: bool) -> Kind:
    """What time in a phase counts as."""
    if phase in ("forward_backward", "optimizer"):
        return "redone" if redone else "productive"
    if phase == "data":
        return "redone" if redone else "data"
    return "save" if phase == "save" else "evaluate" if phase == "evaluate" else "start"


def total(records: Sequence[Incarnation]) -> Goodput:
    """All incarnations together."""
    if not records:
        return Goodput(wall_s=0, productive_s=0, redone_s=0, restarts_s=0, save_s=0, evaluate_s=0, data_s=0, start_s=0, incarnations=0)
    sums = {kind: sum(record.seconds.get(kind, 0.0) for record in records) for kind in KINDS}
    deaths = [(dead, next_one) for dead, next_one in zip(records, records[1:], strict=False) if not dead.closed]
    gaps = sum(max(0.0, next_one.began - dead.updated) for dead, next_one in deaths)
    restarts = sum(next_one.seconds.get("start", 0.0) for _, next_one in deaths)
    return Goodput(
        wall_s=gaps + sum(sum(record.seconds.values()) for record in records),
        productive_s=sums["productive"],
        redone_s=sums["redone"],
        restarts_s=gaps + restarts,
        save_s=sums["save"],
        evaluate_s=sums["evaluate"],
        data_s=sums["data"],
        start_s=sums["start"] - restarts,
        incarnations=len(records),
    )


def read_incarnations(folder: RecoveryFolder) -> list[Incarnation]:
    """The records of a run, oldest first."""
    try:
        lines = folder.goodput.read_text().splitlines()
    except OSError:
        return []
    return sorted((record for line in lines if (record := _record(line)) is not None), key=lambda record: record.incarnation)


def _record(line: str) -> Incarnation | None:
    try:
        return Incarnation(**json.loads(line))
    except (ValueError, TypeError):  # half a line, or another version's
        return None

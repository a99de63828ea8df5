"""A rank's sign of life: where it is, when it last got on, and when its process last ran at all.

The training thread beats at every change of phase; that costs a microsecond or two, and a file at most once a second. Between beats the
watchdog's thread renews the file, so that a rank that waits (its process runs) differs from one that is stopped or gone (it does not).
"""

from __future__ import annotations

import os
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from megasora.recovery.folder import RecoveryFolder, read_json, write_json

Phase = Literal["start", "data", "forward_backward", "optimizer", "save", "evaluate"]
PHASES: tuple[Phase, ...] = get_args(Phase)
STEP_PHASES: tuple[Phase, ...] = ("data", "forward_backward", "optimizer")
RECENT_STEPS = 32


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Which rank of which start of the run this process is."""

    rank: int
    world_size: int
    incarnation: int
    host: str
    pid: int

    @classmethod
    def of_this_process(cls, *, rank: int, world_size: int, incarnation: int) -> Seat:
        """The seat of the process that calls."""
        return cls(rank=rank, world_size=world_size, incarnation=incarnation, host=socket.gethostname(), pid=os.getpid())


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a heartbeat file says."""

    rank: int
    world_size: int
    incarnation: int
    host: str
    pid: int
    step: int
    """Step the rank works on, counted from 1; 0 before the first."""
    phase: Phase
    time: float
    """Unix time of the training thread's last beat."""
    alive: float
    """Unix time when the process last wrote."""


class Heartbeat:
    """Writer of a rank's heartbeat.

    A file that cannot be written (a full disk, a file system that is away) is left for the next time: a sign of life must not end the run.

    Args:
        folder: the run's recovery folder; must exist.
        seat: this process.
        every_s: least time between two writes.
        clock: monotonic seconds.
    """

    def __init__(self, folder: RecoveryFolder, seat: Seat, *, every_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.seat, self.clock = folder, seat, clock
        self.step = 0
        self.phase: Phase = "start"
        self.beat_at = clock()
        self.saving_since: Callable[[], float | None] = lambda: None
        """Since when, by `clock`, this rank writes a checkpoint beside its steps; None while it does not. Any thread may ask."""
        self._every_s = every_s
        self._time = time.time()
        self._due = self.beat_at
        self._step_began = self.beat_at
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._writing = threading.Lock()
        self.failing = False
        """The last write did not succeed: others cannot see this rank, nor, on the same full disk, each other."""

    def beat(self, step: int, phase: Phase) -> None:
        """The training thread works on `step` (from 1) and enters `phase`."""
        now = self.clock()
        if step != self.step:
            if self.step:
                self._steps.append(now - self._step_began)
            self._step_began = now
        self.step, self.phase, self.beat_at, self._time = step, phase, now, time.time()
        self._write_when_due(now)

    def renew(self) -> None:
        """The process runs, whatever the training thread does; for another thread."""
        self._write_when_due(self.clock())

    def write(self) -> None:
        """Write now."""
        if not self._writing.acquire(blocking=False):
            return  # the other thread is at it
        try:
            write_json(self.folder.heartbeat(self.seat.rank), asdict(self.now()))
            self.failing = False
        except OSError:
            self.failing = True
        finally:
            self._writing.release()

    def now(self) -> Beat:
        """What a write would say."""
        return Beat(**asdict(self.seat), step=self.step, phase=self.phase, time=self._time, alive=time.time())

    @property
    def median_step_s(self) -> float | None:
        """Median time of recent steps; None while no step was finished."""
        return statistics.median(list(self._steps)) if self._steps else None

    def _write_when_due(self, now: float) -> None:
        if now >= self._due:
            self._due = now + self._every_s
            self.write()


def read_beats(folder: RecoveryFolder, *, incarnation: int | None = None) -> dict[int, Beat]:
    """Heartbeats by rank: of one incarnation, or of the newest there is."""
    beats = [beat for path in sorted(folder.path.glob("rank_*.json")) if (beat := beat_of(read_json(path))) is not None]
    if incarnation is None:
        incarnation = max((beat.incarnation for beat in beats), default=0)
    return {beat.rank: beat for beat in beats if beat.incarnation == incarnation}


def read_beat(folder: RecoveryFolder, rank: int) -> Beat | None:
    """One rank's heartbeat; None when it has none."""
    return beat_of(read_json(folder.heartbeat(rank)))


def beat_of(record: dict[str, Any] | None) -> Beat | None:
    """A heartbeat file's record as a beat; None when there is none or it is another version's."""
    try:
        return None if record is None else Beat(**record)
    except TypeError:
        return None

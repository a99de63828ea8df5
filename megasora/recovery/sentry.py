"""A rank's part in recovery: the one object that training beats, and that writes down how it ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from megasora.recovery.evidence import ExitRecord, ending_of, exit_record, keep_lost
from megasora.recovery.folder import RecoveryFolder, write_json
from megasora.recovery.goodput import Goodput, GoodputMeter
from megasora.recovery.heartbeat import Heartbeat, Phase, Seat
from megasora.recovery.watchdog import Hang, HangLimits, Watchdog


class Sentry:
    """Beats, watches, accounts, and leaves a record; a context manager around everything a rank does once it knows its run.

    Args:
        run_dir: the run's folder; must exist.
        rank: of this process.
        world_size: ranks of the run.
        incarnation: which start of the run this is, from 1; the same on all ranks, and larger than all before.
        limits: when the run counts as hung; None starts no watchdog.
    """

    def __init__(self, run_dir: Path, *, rank: int, world_size: int, incarnation: int, limits: HangLimits | None) -> None:
        self.folder = RecoveryFolder.of_run(run_dir)
        self.folder.path.mkdir(exist_ok=True)
        seat = Seat.of_this_process(rank=rank, world_size=world_size, incarnation=incarnation)
        keep_lost(self.folder, seat)
        self.heartbeat = Heartbeat(self.folder, seat)
        self._watchdog = Watchdog(self.heartbeat, limits=limits, on_hang=self._record_hang) if limits is not None else None
        self._goodput = GoodputMeter(self.folder, incarnation) if rank == 0 else None
        self._samples: tuple[str, ...] = ()
        self._stop_signal: str | None = None

    def __enter__(self) -> Sentry:
        self.heartbeat.write()
        if self._watchdog is not None:
            self._watchdog.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        ending = ending_of(error, stopped=self._stop_signal is not None)
        beat = self.heartbeat.now()
        self._write(exit_record(beat, ending=ending, time=time.time(), samples=self._samples, error=error, signal=self._stop_signal))
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._goodput is not None:
            self._goodput.close(finished=error is None)

    def beat(self, step: int, phase: Phase) -> None:
        """Training works on `step`, counted from 1, and enters `phase`."""
        self.heartbeat.beat(step, phase)
        if self._goodput is not None:
            self._goodput.beat(step, phase)

    def watch_saves(self, since: Callable[[], float | None]) -> None:
        """Saves go on beside the steps.

        Args:
            since: monotonic time since which this rank writes, None while it does not; asked from another thread.
        """
        self.heartbeat.saving_since = since

    def batch(self, samples: Sequence[str]) -> None:
        """Clips of the step that comes."""
        self._samples = tuple(samples)

    def stopped(self, signal: str) -> None:
        """The run ends because a signal asked for it."""
        self._stop_signal = signal

    def goodput(self) -> Goodput | None:
        """The run's time so far; rank 0 only."""
        return None if self._goodput is None else self._goodput.total()

    def _record_hang(self, hang: Hang) -> None:
        self._write(exit_record(self.heartbeat.now(), ending="hang", time=time.time(), samples=self._samples))
        if self._goodput is not None:
            self._goodput.write()

    def _write(self, record: ExitRecord) -> None:
        with contextlib.suppress(OSError):  # the error that ends the run matters more than its record
            write_json(self.folder.exit(record.incarnation, record.rank), asdict(record))

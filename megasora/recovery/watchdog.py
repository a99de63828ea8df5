"""Finds out that a run hangs, leaves every rank's Python stacks on disk, and ends the process so that the launcher starts it again.

Three ways lead to the verdict, each a daemon thread's look every second:
- this rank made no step for longer than `HangLimits` allow, or a checkpoint that it writes beside its steps takes longer;
- a rank's process writes no heartbeat any more (stopped, gone, or its GIL is held): ranks 0 and 1 look after all others, whatever the
phase;
- another rank's watchdog has said so, in the file that all look for.
A rank that waits in a message for one that waits for a clip may wait as long as that one: a slow clip is no hang, and one that never ends
is given up by its decoder and skipped.
A rank whose GIL is held runs no thread of ours: faulthandler's own C thread, armed anew at each look, then writes its stacks. A process
that was itself stopped and goes on (Ctrl-Z, a suspended job) starts to count afresh, and accuses nobody.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from megasora.config.schema import RecoveryConfig
from megasora.recovery.folder import RecoveryFolder, read_json
from megasora.recovery.heartbeat import STEP_PHASES, Beat, Heartbeat, Phase, Seat, read_beat, read_beats
from megasora.recovery.last_resort import LastResort

HANG_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again."""
OTHERS_WAIT_S = 5.0
"""How long a rank with its own stacks on disk waits for those of others, and one that wrote its part of a save for their verdict."""
SUSPENDED_S = 5.0
"""A look that comes so much later than it should means that this process was stopped."""
PEERS_EVERY_S = 2.0
NEAR_S, FAR_S = 4.0, 90.0
"""A rank that waits for clips lives as long as its heartbeat changes within this, on this host or on another, whose renamed files may be
seen a minute late."""
RANKS_A_SECOND = 16
"""Heartbeat files that a rank reads while it looks for those that wait for clips."""


@dataclass(frozen=True, kw_only=True)
class HangLimits:
    """How long a rank may stay where it is, in seconds; the settings say what each is for."""

    factor: float
    """Medians of recent steps without a step."""
    floor_s: float
    first_step_s: float
    start_s: float
    data_s: float
    """Waiting for clips: one whose decoding never ends is given up before, and the run goes on without it."""
    save_s: float
    evaluate_s: float
    silence_s: float = 120.0
    """A process that wrote no heartbeat for so long is stopped or gone. Within a step the step's own limit notices sooner; a file that
    another host renames may be seen a minute late (NFS caches a folder's names up to acdirmax, 60 s by default)."""
    save_silence_s: float = 180.0
    """The same while saving and evaluating, where pickling holds the GIL for seconds."""
    start_silence_s: float = 300.0
    """The same before the first step, where weights are read and the device is initialised."""
    last_resort_s: float = 30.0
    """Beyond any limit, after which a process ends though it could leave nothing, because a file system blocks."""

    @classmethod
    def of(cls, settings: RecoveryConfig, *, decode_timeout_s: float) -> HangLimits:
        """The limits of a run, whose clips may take `decode_timeout_s`."""
        return cls(
            factor=settings.hang_factor,
            floor_s=settings.hang_floor_s,
            first_step_s=settings.first_step_s,
            start_s=settings.start_s,
            data_s=decode_timeout_s + settings.hang_floor_s,
            save_s=settings.save_s,
            evaluate_s=settings.evaluate_s,
        )

    def allowed_s(self, phase: Phase, median_step_s: float | None) -> float:
        """Longest time in a phase; the median is None before the first step was finished."""
        floors: dict[Phase, float] = {"start": self.start_s, "save": self.save_s, "evaluate": self.evaluate_s, "data": self.data_s}
        floor = floors.get(phase, self.floor_s)
        if median_step_s is None:
            return max(floor, self.first_step_s)
        return max(floor, self.factor * median_step_s) if phase in STEP_PHASES else floor

    def silent_s(self, phase: Phase, step: int) -> float:
        """Longest time without a heartbeat of a process that is in a phase of a step."""
        if phase == "start" or step == 0:
            return self.start_silence_s
        return self.silence_s if phase in STEP_PHASES else self.save_silence_s


@dataclass(frozen=True, kw_only=True)
class Hang:
    """The verdict, as the first rank that came to it wrote it down."""

    rank: int
    """Who says so."""
    host: str
    incarnation: int
    step: int
    phase: Phase
    waited_s: float
    allowed_s: float
    time: float
    silent_ranks: list[int]
    """Ranks whose process wrote no heartbeat any more."""


@dataclass(frozen=True, kw_only=True)
class _Wait:
    """How long something has taken."""

    phase: Phase
    waited_s: float
    allowed_s: float

    @property
    def over_s(self) -> float:
        """Beyond what is allowed; negative before."""
        return self.waited_s - self.allowed_s


def read_hang(folder: RecoveryFolder, incarnation: int) -> Hang | None:
    """The verdict on an incarnation; None without one."""
    record = read_json(folder.hang(incarnation))
    try:
        return None if record is None else Hang(**record)
    except TypeError:  # another version's
        return None


class Stamps:
    """How long ranks' heartbeat files have not changed, by this process's own clock (hosts' clocks differ)."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}
        """rank -> (its stamp, when that was first seen)"""

    def forget(self) -> None:
        """Count afresh."""
        self._seen.clear()

    def still_s(self, beat: Beat, now: float) -> float:
        """Seconds since a heartbeat was first seen as it is."""
        stamp, since = self._seen.get(beat.rank, (0.0, now))
        if stamp != beat.alive:
            since = now
            self._seen[beat.rank] = (beat.alive, now)
        return now - since


class PeerWatch:
    """Which ranks' heartbeat files have stopped changing."""

    def __init__(self, folder: RecoveryFolder, seat: Seat, *, limits: HangLimits) -> None:
        self._folder, self._seat, self._limits, self._stamps = folder, seat, limits, Stamps()

    def forget(self) -> None:
        """Count afresh."""
        self._stamps.forget()

    def silent(self, now: float) -> list[int]:
        """Ranks of this incarnation that have been silent for too long; a rank that has not begun to write is not counted."""
        found = []
        for rank in range(self._seat.world_size):
            beat = None if rank == self._seat.rank else read_beat(self._folder, rank)
            if beat is None or beat.incarnation != self._seat.incarnation:
                continue
            late = self._stamps.still_s(beat, now) > self._limits.silent_s(beat.phase, beat.step)
            if late and not self._folder.exit(beat.incarnation, rank).exists():
                found.append(rank)
        return found


class ClipWaits:
    """Whether a living rank waits for its clips: it keeps the others waiting."""

    def __init__(self, folder: RecoveryFolder, seat: Seat) -> None:
        self._folder, self._seat, self._stamps = folder, seat, Stamps()
        self._due, self._found = 0.0, False

    def any(self, now: float, *, step: int) -> bool:
        """In this step or an earlier one."""
        if now >= self._due:
            self._due = now + self._seat.world_size / RANKS_A_SECOND
            beats = read_beats(self._folder, incarnation=self._seat.incarnation).values()
            others = [beat for beat in beats if beat.rank != self._seat.rank and beat.phase == "data" and beat.step <= step]
            lives = [self._stamps.still_s(beat, now) <= self._patience_s(beat) for beat in others]  # all are looked at
            self._found = any(lives)
        return self._found

    def _patience_s(self, beat: Beat) -> float:
        return NEAR_S if beat.host == self._seat.host else FAR_S


class Watchdog:
    """The thread of a rank that looks for hangs.

    Args:
        heartbeat: this rank's.
        limits: how long a rank may stay where it is.
        on_hang: called once, from the thread, before the process ends: write the exit record here.
        poll_s: time between looks.
        end: ends the process.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        *,
        limits: HangLimits,
        on_hang: Callable[[Hang], None],
        poll_s: float = 1.0,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._heartbeat, self._limits, self._on_hang, self._poll_s, self._end = heartbeat, limits, on_hang, poll_s, end
        self._folder, self._seat, self._clock = heartbeat.folder, heartbeat.seat, heartbeat.clock
        self._peers = PeerWatch(self._folder, self._seat, limits=limits) if self._seat.rank < 2 else None
        self._clips = ClipWaits(self._folder, self._seat)
        self._waits_for_clips = False
        """Of another rank; found out by the thread that may touch files."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="megasora-watchdog", daemon=True)
        self._stacks: io.TextIOWrapper | None = None
        self._looked_at = self._resumed_at = self._peers_at = self._clock()
        self._last_resort = LastResort(
            lambda since: max(wait.over_s for wait in self._waits(since)), grace_s=limits.last_resort_s, code=HANG_EXIT_CODE, end=end
        )

    def start(self) -> None:
        """Begin to look; fatal signals leave their stacks in the same file from here on."""
        self._stacks = self._folder.stacks(self._seat.incarnation, self._seat.rank).open("w")
        self._had_handler = faulthandler.is_enabled()
        faulthandler.enable(self._stacks)
        self._thread.start()
        self._last_resort.start()

    def stop(self) -> None:
        """Look no more; an empty file of stacks goes."""
        self._stopped.set()
        self._last_resort.stop()
        if self._stacks is None:
            return
        if threading.current_thread() is not self._thread:
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
        if self._had_handler:
            faulthandler.enable()
        self._stacks.close()
        self._stacks = None
        path = self._folder.stacks(self._seat.incarnation, self._seat.rank)
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()

    def look(self) -> Hang | None:
        """One look: the verdict, or None."""
        now = self._clock()
        if now - self._looked_at > self._poll_s + SUSPENDED_S:
            self._resumed_at = now
            if self._peers is not None:
                self._peers.forget()
        self._looked_at = now
        self._heartbeat.renew()
        if (hang := read_hang(self._folder, self._seat.incarnation)) is not None:
            return hang
        self._waits_for_clips = False
        longest = max(self._waits(self._resumed_at), key=lambda wait: wait.over_s)
        if longest.over_s > 0 and longest.phase == "forward_backward":
            self._waits_for_clips = self._clips.any(now, step=self._heartbeat.step)
            longest = max(self._waits(self._resumed_at), key=lambda wait: wait.over_s)
        silent = self._silent_peers(now)
        return self._accuse(longest, silent) if longest.over_s > 0 or silent else None

    def _waits(self, resumed_at: float) -> list[_Wait]:
        """What this rank is at: its step, and a save beside it."""
        heartbeat, now = self._heartbeat, self._clock()
        allowed_s = self._limits.allowed_s(heartbeat.phase, heartbeat.median_step_s)
        if self._waits_for_clips and heartbeat.phase == "forward_backward":
            allowed_s = max(allowed_s, self._limits.data_s)
        since = heartbeat.saving_since()
        if heartbeat.phase == "save" and since is None:  # it waits for what another writes, whose own watchdog is to say so first
            allowed_s += OTHERS_WAIT_S
        waits = [_Wait(phase=heartbeat.phase, waited_s=now - max(heartbeat.beat_at, resumed_at), allowed_s=allowed_s)]
        if since is not None:
            waits.append(_Wait(phase="save", waited_s=now - max(since, resumed_at), allowed_s=self._limits.save_s))
        return waits

    def _watch(self) -> None:
        while not self._stopped.wait(self._poll_s):
            assert self._stacks is not None
            allowed = self._limits.allowed_s(self._heartbeat.phase, self._heartbeat.median_step_s)
            faulthandler.dump_traceback_later(
                allowed + 5 * self._poll_s, file=self._stacks
            )  # not `exit`: the process may only be suspended
            if (hang := self.look()) is not None:
                self._give_up(hang)
                return

    def _silent_peers(self, now: float) -> list[int]:
        if self._peers is None or now - self._peers_at < PEERS_EVERY_S:
            return []
        self._peers_at = now
        if self._heartbeat.failing:  # a disk that is full for this rank is full for the others: they are not silent, they cannot be heard
            self._peers.forget()
            return []
        return self._peers.silent(now)

    def _accuse(self, wait: _Wait, silent: list[int]) -> Hang:
        """Write the verdict down, unless another rank was first."""
        beat = self._heartbeat.now()
        hang = Hang(
            rank=beat.rank,
            host=beat.host,
            incarnation=beat.incarnation,
            step=beat.step,
            phase=wait.phase,
            waited_s=round(wait.waited_s, 1),
            allowed_s=round(wait.allowed_s, 1),
            time=time.time(),
            silent_ranks=silent,
        )
        path = self._folder.hang(beat.incarnation)
        own = path.with_name(f"{path.name}.{beat.rank}")
        try:
            own.write_text(json.dumps(asdict(hang)))
            with contextlib.suppress(FileExistsError):
                os.link(own, path)  # unlike a rename, does not replace the first verdict
            own.unlink()
        except OSError:  # no links here, or no space: the others come to their own verdict
            return hang
        return read_hang(self._folder, beat.incarnation) or hang

    def _give_up(self, hang: Hang) -> None:
        """Leave the stacks, wait for those of the others, end."""
        assert self._stacks is not None
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.flush()
        self._on_hang(hang)
        if hang.rank == self._seat.rank:
            print(hang_line(hang, run_dir=str(self._folder.path.parent)), file=sys.stderr, flush=True)
        deadline = self._clock() + OTHERS_WAIT_S
        while self._clock() < deadline and ranks_without_stacks(self._folder, self._seat):
            time.sleep(0.1)
        self._end(HANG_EXIT_CODE)


def hang_line(hang: Hang, *, run_dir: str) -> str:
    """What the first rank that saw the hang prints."""
    silent = f"; no sign of life from rank {', '.join(map(str, hang.silent_ranks))}" if hang.silent_ranks else ""
    return (
        f"megasora: the run hangs: rank {hang.rank} on {hang.host} is in {hang.phase} of step {hang.step} for {hang.waited_s:.0f} s"
        f"{silent}; stacks are in {run_dir}/recovery; megasora doctor --run {run_dir} explains"
    )


def ranks_without_stacks(folder: RecoveryFolder, seat: Seat) -> list[int]:
    """Ranks of the seat's world that left no stacks of its incarnation."""

    def size(rank: int) -> int:
        try:
            return folder.stacks(seat.incarnation, rank).stat().st_size
        except OSError:
            return 0

    return [rank for rank in range(seat.world_size) if not size(rank)]

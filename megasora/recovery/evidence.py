"""What an incarnation of a run leaves: how each rank ended, by its own account and its supervisor's, and last heartbeats of the rest."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from megasora.config.errors import UserError
from megasora.recovery.folder import RecoveryFolder, read_json, write_json
from megasora.recovery.goodput import read_incarnations
from megasora.recovery.heartbeat import Beat, Phase, Seat, beat_of, read_beat, read_beats
from megasora.recovery.watchdog import Hang, read_hang

Ending = Literal["finished", "stopped", "interrupted", "mistake", "exception", "hang"]
"""The run's last step was made; asked to stop by a signal; Ctrl-C; a user's mistake; an error; ended by the watchdog."""
MAX_SAMPLES = 64
KEPT_INCARNATIONS = 20
FATAL = "Fatal Python error"
"""How faulthandler begins after a fatal signal."""

_COMMUNICATION_TYPES = {
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    "ConnectionError",
    "ConnectionResetError",
    "BrokenPipeError",
}
_COMMUNICATION = re.compile(
    r"nccl|gloo|connection (?:was )?(?:closed|reset|refused)|(?:closed|reset) by peer|broken pipe|socket (?:timeout|error)|tcpstore"
    r"|(?:collective|allreduce|all_reduce|allgather|broadcast|barrier|recv|send)\w*.{0,80}tim(?:ed|e) ?out"
    r"|process group.{0,40}abort|remote process",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class ExitRecord:
    """How a rank ended, as it saw it."""

    rank: int
    world_size: int
    incarnation: int
    host: str
    pid: int
    step: int
    phase: Phase
    ending: Ending
    time: float
    samples: list[str] = field(default_factory=list)
    """Clips of the step, as far as known."""
    error: str | None = None
    """Type of the exception."""
    message: str | None = None
    trace: str | None = None
    signal: str | None = None
    """What asked it to stop."""

    @property
    def communicates(self) -> bool:
        """Whether the error is one of talking to other ranks."""
        return self.error is not None and is_communication_error(self.error, self.message or "")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a rank's process ended, as its supervisor saw it."""

    rank: int
    generation: int
    host: str
    pid: int
    code: int
    """Exit code; -9 for SIGKILL and so on."""
    by_supervisor: bool
    """The supervisor ended it, because another rank had died."""
    out_of_memory: str | None
    """The kernel's words, when it ended a process for want of memory."""
    time: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that an incarnation left."""

    incarnation: int
    beats: Mapping[int, Beat]
    exits: Mapping[int, ExitRecord]
    ended: Mapping[int, Ended]
    """Only of this incarnation's processes."""
    hang: Hang | None
    fatal: Mapping[int, str]
    """rank -> faulthandler's first line after a fatal signal."""
    stackless: list[int]

    @property
    def silent(self) -> list[int]:
        """Ranks that left no exit record and that no supervisor ended, the longest silent first."""
        ranks = [rank for rank in self.beats if rank not in self.exits and not (rank in self.ended and self.ended[rank].by_supervisor)]
        return sorted(ranks, key=lambda rank: self.beats[rank].alive)


def is_communication_error(error: str, message: str) -> bool:
    """Whether an exception says no more than that other ranks did not answer."""
    return error in _COMMUNICATION_TYPES or _COMMUNICATION.search(message) is not None


def ending_of(error: BaseException | None, *, stopped: bool) -> Ending:
    """What an exception that leaves training (or none) means."""
    if error is None:
        return "stopped" if stopped else "finished"
    if isinstance(error, UserError):
        return "mistake"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "exception"


def exit_record(
    beat: Beat, *, ending: Ending, time: float, samples: Sequence[str] = (), error: BaseException | None = None, signal: str | None = None
) -> ExitRecord:
    """The record of a rank that is where `beat` says."""
    return ExitRecord(
        rank=beat.rank,
        world_size=beat.world_size,
        incarnation=beat.incarnation,
        host=beat.host,
        pid=beat.pid,
        step=beat.step,
        phase=beat.phase,
        ending=ending,
        time=time,
        samples=list(samples[:MAX_SAMPLES]),
        error=None if error is None else type(error).__name__,
        message=None if error is None else str(error),
        trace=None if error is None else "".join(traceback.format_exception(error)),
        signal=signal,
    )


def incarnations(folder: RecoveryFolder) -> list[int]:
    """Starts of the run that left something, oldest first."""
    named = (re.match(r"(?:exit|lost)_(\d+)_rank_", path.name) for path in folder.path.glob("*_rank_*.json"))
    return sorted({int(match.group(1)) for match in named if match} | {beat.incarnation for beat in read_beats(folder).values()})


def next_incarnation(folder: RecoveryFolder) -> int:
    """Number of a start after all that left something; one rank asks and tells the others."""
    return max([0, *incarnations(folder), *(record.incarnation for record in read_incarnations(folder))]) + 1


def read_evidence(folder: RecoveryFolder, incarnation: int) -> Evidence:
    """What an incarnation left."""
    exits = {
        record.rank: record for path in folder.path.glob(f"exit_{incarnation:04d}_rank_*.json") if (record := _exit_record(read_json(path)))
    }
    lost = [kept for path in folder.path.glob(f"lost_{incarnation:04d}_rank_*.json") if (kept := read_json(path))]
    beats = {rank: _last_beat(record) for rank, record in exits.items()}
    ended: dict[int, Ended] = {}
    for beat, end in [(beat_of(r["beat"]), _ended(r["ended"])) for r in lost] + [
        (beat, read_ended(folder, beat)) for beat in read_beats(folder, incarnation=incarnation).values()
    ]:
        if beat is not None:
            beats[beat.rank] = beat
            if end is not None:
                ended[beat.rank] = end
    return Evidence(
        incarnation=incarnation,
        beats=beats,
        exits=exits,
        ended=ended,
        hang=read_hang(folder, incarnation),
        fatal={rank: line for rank in beats if (line := _fatal_line(folder, incarnation, rank)) is not None},
        stackless=[rank for rank in sorted(beats) if not _has_stacks(folder, incarnation, rank)],
    )


def keep_lost(folder: RecoveryFolder, seat: Seat) -> None:
    """Keep the last heartbeat of a rank that wrote no exit record, before this rank's replaces it; drop what is 20 incarnations old.

    A world that shrank leaves ranks without a successor: rank r takes care of r, r + world_size, ...
    """
    rank = seat.rank
    while (beat := read_beat(folder, rank)) is not None or rank == seat.rank:
        if beat is not None and beat.incarnation < seat.incarnation and not folder.exit(beat.incarnation, rank).exists():
            ended = read_ended(folder, beat)
            write_json(folder.lost(beat.incarnation, rank), {"beat": asdict(beat), "ended": None if ended is None else asdict(ended)})
            if not _has_stacks(folder, beat.incarnation, rank):
                folder.stacks(beat.incarnation, rank).unlink(missing_ok=True)
        old = seat.incarnation - KEPT_INCARNATIONS
        for path in (folder.exit(old, rank), folder.lost(old, rank), folder.stacks(old, rank), folder.hang(old)):
            path.unlink(missing_ok=True)
        rank += seat.world_size


def _fatal_line(folder: RecoveryFolder, incarnation: int, rank: int) -> str | None:
    try:
        text = folder.stacks(incarnation, rank).read_text()
    except OSError:
        return None
    return next((line for line in text.splitlines() if line.startswith(FATAL)), None)


def _has_stacks(folder: RecoveryFolder, incarnation: int, rank: int) -> bool:
    path = folder.stacks(incarnation, rank)
    return path.exists() and path.stat().st_size > 0


def _last_beat(record: ExitRecord) -> Beat:
    return Beat(
        rank=record.rank,
        world_size=record.world_size,
        incarnation=record.incarnation,
        host=record.host,
        pid=record.pid,
        step=record.step,
        phase=record.phase,
        time=record.time,
        alive=record.time,
    )


def _exit_record(record: dict[str, Any] | None) -> ExitRecord | None:
    try:
        return None if record is None else ExitRecord(**record)
    except TypeError:  # another version's
        return None


def _ended(record: dict[str, Any] | None) -> Ended | None:
    try:
        return None if record is None else Ended(**record)
    except TypeError:  # another version's
        return None


def read_ended(folder: RecoveryFolder, beat: Beat) -> Ended | None:
    """What the supervisor of a heartbeat's process says of its end."""
    ended = _ended(read_json(folder.ended(beat.rank)))
    return ended if ended is not None and (ended.host, ended.pid) == (beat.host, beat.pid) else None

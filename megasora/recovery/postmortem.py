"""How ranks ended, and which of them ended first for a reason of its own.

A rank that dies takes the others with it: their errors (a peer closed the connection, a collective timed out) say nothing about the
cause. `first_cause` therefore looks, in this order, for a user's mistake or an error that is no communication error, for a rank that left
no record (killed, or its node is gone), for a hang, and only then for the earliest communication error.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from megasora.recovery.evidence import Evidence, ExitRecord
from megasora.recovery.heartbeat import Beat
from megasora.recovery.watchdog import Hang


@dataclass(frozen=True, kw_only=True)
class Cause:
    """What ended an incarnation first."""

    kind: Literal["running", "finished", "stopped", "interrupted", "mistake", "exception", "killed", "hang", "communication"]
    incarnation: int
    rank: int
    host: str
    pid: int
    step: int
    phase: str
    time: float
    what: str
    """One line: the exception, the signal, who waited for whom."""
    samples: list[str] = field(default_factory=list)
    trace: str | None = None
    out_of_memory: bool = False
    secondary: int = 0
    """Errors of other ranks that followed from it."""
    stackless: list[int] = field(default_factory=list)
    """After a hang: ranks that left no stacks."""


def first_cause(evidence: Evidence, *, now: float, quiet_s: float = 60.0) -> Cause:
    """What ended the incarnation.

    Args:
        evidence: what it left.
        now: unix time.
        quiet_s: a rank without a record whose heartbeat is younger still runs; one from further ahead in time is of a clock that was set
            back since, by a process that writes no more.
    """
    exits = evidence.exits
    own = sorted((r for r in exits.values() if r.ending in ("mistake", "exception") and not r.communicates), key=lambda r: r.time)
    if own:
        return _of_record(own[0], evidence)
    silent = evidence.silent
    failed = [record for record in exits.values() if record.ending in ("exception", "hang")]
    ended = any(rank in evidence.ended for rank in silent)
    if silent and not ended and not failed and min(abs(now - evidence.beats[rank].alive) for rank in silent) < quiet_s:
        beat = evidence.beats[silent[0]]
        return _of_beat(beat, "running", f"all {len(evidence.beats)} ranks gave a sign of life in the last {quiet_s:.0f} s", evidence)
    if evidence.hang is not None and not any(rank in evidence.ended for rank in silent):
        return _of_hang(evidence, evidence.hang)
    if silent:
        return _of_silent(evidence, silent)
    if failed:
        return _of_record(min(failed, key=lambda record: record.time), evidence, kind="communication")
    return _of_record(min(exits.values(), key=lambda record: (record.ending == "finished", record.time)), evidence)


def _of_record(record: ExitRecord, evidence: Evidence, *, kind: Literal["communication"] | None = None) -> Cause:
    if record.error is not None:
        what = f"{record.error}: {record.message}"
    else:
        what = {"finished": "the last step was made", "stopped": f"asked to stop by {record.signal or 'a signal'}"}.get(
            record.ending, record.ending
        )
    return Cause(
        kind=kind or record.ending,
        incarnation=record.incarnation,
        rank=record.rank,
        host=record.host,
        pid=record.pid,
        step=record.step,
        phase=record.phase,
        time=record.time,
        what=what,
        samples=record.samples,
        trace=record.trace,
        out_of_memory=record.error == "OutOfMemoryError" or record.error == "MemoryError",
        secondary=_others_failed(evidence, record.rank),
    )


def _of_silent(evidence: Evidence, silent: Sequence[int]) -> Cause:
    """A rank that left no record: killed, or gone with its node."""
    killed = [rank for rank in silent if rank in evidence.ended]
    rank = min(killed, key=lambda r: evidence.ended[r].time) if killed else silent[0]
    beat, ended, fatal = evidence.beats[rank], evidence.ended.get(rank), evidence.fatal.get(rank)
    if ended is not None and ended.code < 0:
        what = f"ended by {signal_name(-ended.code)}"
    elif ended is not None:
        what = f"ended with exit code {ended.code}"
    else:
        what = "left no record: killed (SIGKILL, out of memory), or its node is gone"
    if fatal is not None:
        what += f" ({fatal})"
    if ended is not None and ended.out_of_memory:
        what += f"; out of memory: {ended.out_of_memory}"
    out_of_memory = ended is not None and ended.out_of_memory is not None
    return replace(_of_beat(_caught_up(beat, evidence), "killed", what, evidence), out_of_memory=out_of_memory)


def _caught_up(beat: Beat, evidence: Evidence) -> Beat:
    """A killed rank's last beat: its file is up to a second old, and ranks that failed for want of it say how far it came."""
    waiting = [record for record in evidence.exits.values() if record.communicates and record.step > beat.step]
    nearest = min(waiting, key=lambda record: record.step, default=None)
    return beat if nearest is None else replace(beat, step=nearest.step, phase=nearest.phase)


def _of_hang(evidence: Evidence, hang: Hang) -> Cause:
    """The rank that the others waited for: silent, or without a record, or the one that is least far."""
    recordless = sorted(evidence.beats.keys() - evidence.exits.keys(), key=lambda rank: evidence.beats[rank].alive)
    suspects = [rank for rank in (*hang.silent_ranks, *recordless) if rank in evidence.beats]
    stopped = f"its process did not run: stopped, or its GIL was held; rank {hang.rank} waited {hang.waited_s:.0f} s in {hang.phase}"
    if suspects:
        rank, what = suspects[0], stopped
    elif hang.phase == "save":
        rank, what = hang.rank, f"a checkpoint was being written for {hang.waited_s:.0f} s ({hang.allowed_s:.0f} s are allowed)"
    else:
        rank = min(evidence.beats, key=lambda r: (evidence.beats[r].step, evidence.beats[r].time))
        what = f"no step for {hang.waited_s:.0f} s ({hang.allowed_s:.0f} s are allowed), first seen by rank {hang.rank}; {_where(evidence)}"
    return replace(_of_beat(evidence.beats[rank], "hang", what, evidence), stackless=evidence.stackless)


def _of_beat(beat: Beat, kind: Literal["running", "killed", "hang"], what: str, evidence: Evidence) -> Cause:
    return Cause(
        kind=kind,
        incarnation=beat.incarnation,
        rank=beat.rank,
        host=beat.host,
        pid=beat.pid,
        step=beat.step,
        phase=beat.phase,
        time=beat.time,
        what=what,
        samples=_samples_of_step(evidence, beat.step),
        secondary=_others_failed(evidence, beat.rank),
    )


def _where(evidence: Evidence) -> str:
    """Which ranks are in which phase."""
    places: dict[str, list[int]] = {}
    for rank, beat in sorted(evidence.beats.items()):
        places.setdefault(f"{beat.phase} of step {beat.step}", []).append(rank)
    return "; ".join(f"rank {_short(ranks)} in {place}" for place, ranks in places.items())


def _short(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


def _others_failed(evidence: Evidence, rank: int) -> int:
    failed = {r for r, record in evidence.exits.items() if record.ending in ("exception", "hang", "mistake")}
    killed = {r for r in evidence.ended if evidence.ended[r].code != 0}
    return len((failed | killed) - {rank})


def _samples_of_step(evidence: Evidence, step: int) -> list[str]:
    """All ranks know a step's clips: those of a rank that wrote them down."""
    return next((record.samples for record in evidence.exits.values() if record.step == step and record.samples), [])


def signal_name(number: int) -> str:
    """SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

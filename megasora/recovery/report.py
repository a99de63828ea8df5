"""What `megasora doctor --run` says: the last exit in a few lines, from the files of run_dir/recovery."""

from __future__ import annotations

import socket
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megasora.recovery.evidence import FATAL, incarnations, read_evidence
from megasora.recovery.folder import RecoveryFolder
from megasora.recovery.goodput import Goodput, read_incarnations, total
from megasora.recovery.heartbeat import Beat, read_beats
from megasora.recovery.kernel import out_of_memory_of
from megasora.recovery.postmortem import Cause, first_cause

SHOWN_SAMPLES = 8
SHOWN_EARLIER = 5


@dataclass(frozen=True, kw_only=True)
class Report:
    """The last exit of a run, and how it stands."""

    cause: Cause | None
    """None: no incarnation has ended."""
    running: Beat | None
    """The rank that is least far of an incarnation that runs now."""
    saved_step: int | None
    """Newest complete checkpoint."""
    lost_steps: int
    """Steps that were made and are not in it."""
    earlier: list[Cause]
    """Why incarnations before it ended, the oldest first."""
    same_place: list[int]
    """Earlier incarnations that ended in the same step with the same error."""
    goodput: Goodput

    def data(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "goodput": self.goodput.data()}


def examine(run_dir: Path, *, saved_step: int | None, now: float | None = None) -> Report:
    """Read what a run left.

    Args:
        run_dir: the run's folder.
        saved_step: step of its newest complete checkpoint.
        now: unix time; None reads the clock.
    """
    folder, now = RecoveryFolder.of_run(run_dir), time.time() if now is None else now
    causes = [first_cause(read_evidence(folder, number), now=now) for number in incarnations(folder)]
    running = None
    if causes and causes[-1].kind == "running":
        running = min(read_beats(folder, incarnation=causes.pop().incarnation).values(), key=lambda beat: (beat.step, beat.rank))
    cause = _with_kernel(causes[-1]) if causes else None
    records = read_incarnations(folder)
    made = max((record.last_step for record in records if cause is not None and record.incarnation <= cause.incarnation), default=0)
    if cause is not None:
        made = max(made, cause.step - (cause.kind not in ("finished", "stopped")))
    same = [c.incarnation for c in causes[:-1] if cause is not None and _repeats(cause) and (c.step, c.what) == (cause.step, cause.what)]
    return Report(
        cause=cause,
        running=running,
        saved_step=saved_step,
        lost_steps=max(0, made - (saved_step or 0)) if running is None else 0,
        earlier=causes[:-1],
        same_place=same,
        goodput=total(records),
    )


def _repeats(cause: Cause) -> bool:
    """Whether a second end of the kind in the same step is no chance: not of a kill from outside."""
    return cause.kind == "exception" or (cause.kind == "killed" and FATAL in cause.what)


def _with_kernel(cause: Cause) -> Cause:
    """Ask this host's kernel why it ended a process, where no supervisor has."""
    if cause.kind != "killed" or cause.out_of_memory or cause.host != socket.gethostname():
        return cause
    line = out_of_memory_of(cause.pid)
    return cause if line is None else replace(cause, what=f"{cause.what}; out of memory: {line}", out_of_memory=True)


def report_lines(report: Report, *, run_dir: Path) -> list[str]:
    """For a person at 3 a.m."""
    lines = []
    if report.running is not None:
        beat = report.running
        lines.append(f"running: incarnation {beat.incarnation}, {beat.phase} of step {beat.step}, {beat.world_size} rank(s)")
    cause = report.cause
    if cause is None:
        return lines or [f"{run_dir}: no rank has left a record; the run never started, or ended before its groups stood (see its log)"]
    lines.append(f"incarnation {cause.incarnation} {_VERB[cause.kind]} at {_clock(cause.time)}")
    if cause.kind not in ("finished", "stopped"):
        lines.append(f"first cause: rank {cause.rank} on {cause.host}, {cause.phase} of step {cause.step}: {cause.what}")
        lines += _details(cause, run_dir=run_dir)
    else:
        lines.append(f"step {cause.step}: {cause.what}")
    lines += [
        f"earlier: incarnation {c.incarnation} {_VERB[c.kind]} at {_clock(c.time)}: rank {c.rank} on {c.host}, step {c.step}: {c.what}"
        for c in report.earlier[-SHOWN_EARLIER:]
    ]
    lines.append(_saved(report))
    if report.goodput.incarnations:
        lines.append(goodput_line(report.goodput))
    lines.append(f"next: {next_action(report)}")
    return lines


_VERB = {
    "running": "runs, last beat",
    "finished": "finished",
    "stopped": "stopped as asked",
    "interrupted": "was interrupted",
    "mistake": "ended by a mistake in settings, files or set-up",
    "exception": "died of an exception",
    "killed": "lost a process",
    "hang": "hung; last beat of the rank waited for",
    "communication": "died of a communication error, with no other error to explain it,",
}


def _details(cause: Cause, *, run_dir: Path) -> list[str]:
    lines = []
    if cause.samples:
        more = f" and {len(cause.samples) - SHOWN_SAMPLES} more" if len(cause.samples) > SHOWN_SAMPLES else ""
        lines.append(f"  clips of the step: {', '.join(cause.samples[:SHOWN_SAMPLES])}{more}")
    if cause.trace is not None and cause.kind == "exception":
        lines += [f"  {line.strip()}" for line in cause.trace.rstrip().splitlines()[-3:-1]]
    if cause.kind == "hang":
        stacks = f"{run_dir}/recovery/stacks_{cause.incarnation:04d}_rank_*.txt"
        none = f"; none from rank {', '.join(map(str, cause.stackless))}" if cause.stackless else ""
        lines.append(f"  stacks: {stacks}{none}")
    if cause.secondary:
        lines.append(f"  left out: {cause.secondary} rank(s) whose errors followed from it")
    return lines


def _saved(report: Report) -> str:
    if report.saved_step is None:
        return f"saved: nothing; {report.lost_steps} step(s) are lost" if report.lost_steps else "saved: nothing yet"
    return f"saved: step {report.saved_step}" + (f"; {report.lost_steps} step(s) are made again" if report.lost_steps else "")


def next_action(report: Report) -> str:
    """What to do about it."""
    cause = report.cause
    assert cause is not None
    if report.running is not None:
        return "nothing: the run goes on"
    if cause.kind == "finished":
        return "nothing; more steps: raise --train.steps"
    if cause.kind == "mistake":
        return "mend what the first cause names, then run the same command again"
    if report.same_place:
        return (
            f"incarnation(s) {', '.join(map(str, report.same_place))} ended in the same step in the same way: a restart will not help; "
            "look at the clips and lines above"
        )
    if cause.out_of_memory and cause.kind == "killed":
        return f"{cause.host} ran out of host memory: fewer --data.decode_workers or ranks on the host; then the same command"
    if cause.out_of_memory:
        return "megasora validate with the same settings names what saves memory; then the same command"
    if cause.kind == "killed":
        return f"dmesg on {cause.host} says who killed it, unless the node is gone; the same command goes on from the checkpoint"
    if cause.kind == "hang":
        return f"look at the stacks; leave {cause.host} out if it comes back; the same command goes on from the checkpoint"
    if cause.kind == "communication":
        return f"look at the network of {cause.host} (NCCL_DEBUG=WARN names the peer); the same command goes on from the checkpoint"
    return "the same command goes on from the checkpoint"


def goodput_line(goodput: Goodput) -> str:
    """Where the time went."""
    parts = (
        ("steps made again", goodput.redone_s),
        ("restarts", goodput.restarts_s),
        ("saving", goodput.save_s),
        ("evaluation", goodput.evaluate_s),
        ("waiting for clips", goodput.data_s),
        ("first start", goodput.start_s),
    )
    rest = [f"{name} {_duration(seconds)}" for name, seconds in parts if seconds >= 0.05]
    made = f"goodput: {goodput.share:.1%} of {_duration(goodput.wall_s)} in {goodput.incarnations} incarnation(s) made new steps"
    return "; ".join([made, *([", ".join(rest)] if rest else [])])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")

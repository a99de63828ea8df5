"""Checkpoints while training goes on: one copy into host memory is the only stall, threads do the rest.

    save   rank 0 makes the folder (or says why not), every rank copies its tensors and starts a thread: write, hash, sync
    poll   at a step boundary: have all ranks written? Then rank 0's thread gets their hashes and commits (checkpoint/commit.py)
    poll   has rank 0 committed? Then every rank knows it, at the same step

Threads never use a collective: what ranks must agree on (a message of three numbers, facts of files twice a save) travels inside save,
poll and wait, over gloo and host memory, so that no GPU is waited for. Megatron's own asynchronous save is not used; docs/architecture.md
says why.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megasora.checkpoint import commit, manifests
from megasora.checkpoint.lease import Lease, LeaseLostError
from megasora.checkpoint.rank_file import RankFile, write_rank_file
from megasora.checkpoint.staging import HostCopy, Plan, make_plan, megatron_files, signature_of
from megasora.config.errors import UserError

Event = dict[str, Any]
_WAIT_S = 0.005
"""Pause between two looks of a waiting rank."""
_NICE = 19
"""A writing thread gets what training leaves of a core."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay: the newest `keep` (0: all) and those at multiples of `keep_every_steps` (0: none)."""

    keep: int = 0
    keep_every_steps: int = 0


@dataclass(kw_only=True)
class _Pending:
    """The save under way.

    Attributes:
        folder: where it is written.
        phase: what the threads are doing.
        problem: rank 0: what it failed of, once that is known.
    """

    step: int
    state: Mapping[str, Any]
    folder: Path
    started: float
    stall_s: float = 0.0
    waited_s: float = 0.0
    phase: Literal["write", "commit"] = "write"
    cancelled: threading.Event = field(default_factory=threading.Event)
    problem: str | None = None
    note: str | None = None


class Form(Protocol):
    """What the folders of checkpoints are made of."""

    name: str
    """In the manifest."""

    def plan(self, tensors: Mapping[str, ShardedTensor]) -> Plan:
        """What this rank writes; all ranks of the writer together."""

    def extras(self, plan: Plan, files: Sequence[RankFile | None]) -> dict[str, bytes]:
        """Small files beside those of the ranks, which are in their order; on the rank that holds the lease."""


class SharedForm:
    """Each tensor once, as Megatron reads it in any layout."""

    name = manifests.TRAINING

    def plan(self, tensors: Mapping[str, ShardedTensor]) -> Plan:
        """See `Form.plan`."""
        return make_plan(tensors)

    def extras(self, plan: Plan, files: Sequence[RankFile | None]) -> dict[str, bytes]:
        """See `Form.extras`."""
        return megatron_files(plan, files)


class CheckpointWriter:
    """Writes checkpoints into one folder; every method is called by all ranks of its group together.

    Args:
        root: the checkpoints folder, seen by all its ranks.
        lease: the right to write there, of the group's first rank; None on the others.
        asynchronous: whether `save` returns after the copy, or after the commit.
        retention: which older checkpoints stay after a commit.
        form: of the checkpoints.
        group: the ranks that write there together, over gloo; None: all.
    """

    def __init__(
        self,
        root: Path,
        *,
        lease: Lease | None,
        asynchronous: bool = True,
        retention: Retention | None = None,
        form: Form | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.root, self.asynchronous = root, asynchronous
        self._lease, self._retention, self._form = lease, retention or Retention(), form or SharedForm()
        whole = dist.group.WORLD if dist.get_backend() == "gloo" else None
        self._group = group or whole or dist.new_group(backend="gloo")
        self._first = dist.get_global_rank(self._group, 0)
        assert (lease is not None) == (dist.get_rank() == self._first), "the first rank holds the lease"
        self._plan: Plan | None = None
        self._copy: HostCopy | None = None
        self._pending: _Pending | None = None
        self._thread: threading.Thread | None = None
        self._thread_since = 0.0
        self._written: RankFile | None = None
        self._failure: str | None = None
        self._events: list[Event] = []
        self._last_problem: str | None = None

    @property
    def host_bytes(self) -> int:
        """Host memory this rank keeps for copies."""
        return self._copy.num_bytes if self._copy is not None else 0

    @property
    def pending(self) -> bool:
        """Whether a save is under way; the same on every rank."""
        return self._pending is not None

    def writing_since(self) -> float | None:
        """Monotonic time since which this rank's thread is at work, None while it is not; for any thread."""
        thread, since = self._thread, self._thread_since
        return since if thread is not None and thread.is_alive() else None

    def save(self, *, step: int, tensors: Mapping[str, ShardedTensor], state: Mapping[str, Any]) -> None:
        """Start a checkpoint; when it returns the tensors may change.

        Args:
            step: optimizer steps done.
            tensors: this rank's rectangles.
            state: JSON-able small state, the same on every rank.

        Raises:
            UserError: another run has taken over.
        """
        started = time.perf_counter()
        waited = self.pending
        self.wait()
        waited_s = time.perf_counter() - started if waited else 0.0
        sources = self._planned(tensors)
        folder = self._open(step)
        self._pending = _Pending(
            step=step, state=json.loads(json.dumps(dict(state))), folder=folder or self.root, started=started, waited_s=waited_s
        )
        if folder is None:
            self._finish(self._failure)
            return
        assert self._copy is not None
        self._copy.fill([source.detach() for source in sources])
        self._start(self._write)
        self._pending.stall_s = time.perf_counter() - started
        if not self.asynchronous:
            self.wait()

    def poll(self) -> list[Event]:
        """What was committed or failed since the last call; one small message.

        Raises:
            UserError: another run has taken over.
        """
        self._advance()
        events, self._events = self._events, []
        return events

    def wait(self) -> None:
        """Return when no save is under way; `poll` then tells how it ended.

        Raises:
            UserError: another run has taken over.
        """
        while self._pending is not None:
            self._advance()
            if self._pending is not None:
                time.sleep(_WAIT_S)

    def close(self) -> None:
        """The end of a run: wait, let the host memory go.

        Raises:
            UserError: the newest checkpoint could not be written, or another run has taken over.
        """
        try:
            self.wait()
        finally:
            self.abandon()
        if self._last_problem is not None:
            raise UserError(
                f"the last checkpoint could not be written ({self._last_problem}); what was saved before is whole. "
                f"Make room or mend {self.root}, then start the same command again: it goes on from there"
            )

    def abandon(self) -> None:
        """The end of a run that failed, on this rank alone: stop the threads, no message."""
        if self._pending is not None:
            self._pending.cancelled.set()
        if self._thread is not None:
            self._thread.join()
        if self._copy is not None:
            self._copy.close()
            self._copy = None
        self._pending = self._plan = self._thread = None

    def _planned(self, tensors: Mapping[str, ShardedTensor]) -> list[torch.Tensor]:
        """What this rank copies; a new plan when any rank's structure is new."""
        changed = torch.tensor([self._plan is None or signature_of(tensors) != self._plan.signature], dtype=torch.int64)
        dist.all_reduce(changed, op=dist.ReduceOp.MAX, group=self._group)
        if changed.item():
            if self._copy is not None:
                self._copy.close()
            self._plan = self._form.plan(tensors)
            self._copy = HostCopy([tensors[name].data for name in self._plan.names])
        assert self._plan is not None
        return [tensors[name].data for name in self._plan.names]

    def _open(self, step: int) -> Path | None:
        """The folder to write into, made by rank 0; None when that failed."""
        answer: list[tuple[str, str]] = [("", "")]
        if self._lease is not None:
            folder = self._lease.work / f"step_{step:08d}"
            try:
                self._lease.check()
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                answer = [("folder", str(folder))]
            except LeaseLostError as error:
                answer = [("lost", str(error))]
            except OSError as error:
                answer = [("failed", _said(error, folder))]
        dist.broadcast_object_list(answer, src=self._first, group=self._group)
        ((kind, text),) = answer
        if kind == "lost":
            raise LeaseLostError(text)
        self._failure = text if kind == "failed" else None
        return Path(text) if kind == "folder" else None

    def _start(self, work: Callable[[_Pending], None]) -> None:
        assert self._pending is not None
        self._thread_since = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(work, self._pending), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[_Pending], None], pending: _Pending) -> None:
        """A thread's whole life: whatever it fails of is the save's failure, never the run's."""
        if self.asynchronous:
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            work(pending)
        except OSError as error:
            self._failure = _said(error, pending.folder)
        except Exception as error:  # noqa: BLE001 - said in the event, with its type
            self._failure = f"{type(error).__name__}: {error}"

    def _write(self, pending: _Pending) -> None:
        assert self._copy is not None
        self._written = None
        if self._copy.tensors:
            path = pending.folder / f"__{dist.get_rank()}_0.distcp"
            self._written = write_rank_file(path, self._copy.tensors, cancelled=pending.cancelled)

    def _advance(self) -> None:
        """One exchange of where the ranks stand, and what follows from it."""
        busy = self._thread is not None and self._thread.is_alive()
        lost = self._lease is not None and self._lease.lost
        stand = torch.tensor([lost, self._failure is not None, busy], dtype=torch.int64)
        dist.all_reduce(stand, op=dist.ReduceOp.MAX, group=self._group)
        any_lost, any_failed, any_busy = (bool(value) for value in stand.tolist())
        if any_lost:
            self._raise_lost()
        pending = self._pending
        if pending is None:
            return
        if any_failed:
            pending.cancelled.set()
        if any_busy:
            return
        self._thread = None
        if pending.phase == "write":
            self._collect(pending)
        else:
            self._conclude(pending)

    def _raise_lost(self) -> None:
        said = [self._lease.loss() if self._lease is not None else ""]
        dist.broadcast_object_list(said, src=self._first, group=self._group)
        self.abandon()
        raise LeaseLostError(said[0])

    def _collect(self, pending: _Pending) -> None:
        """All ranks' threads have ended: rank 0 commits what they wrote, or removes it."""
        gathered: list[Any] | None = [None] * dist.get_world_size(self._group) if self._lease is not None else None
        dist.gather_object((self._failure, self._written), gathered, dst=self._first, group=self._group)
        pending.phase = "commit"
        self._failure = None
        if gathered is None:
            return
        ranks = dist.get_process_group_ranks(self._group)
        problems = [f"rank {rank}: {failure}" for rank, (failure, _) in zip(ranks, gathered, strict=True) if failure is not None]
        causes = [problem for problem in problems if "CancelledError" not in problem]
        if problems:
            pending.problem = (causes or problems)[0]
            self._start(self._remove)
        else:
            files = [file for _, file in gathered]
            self._start(lambda pending: self._commit(pending, files))

    def _remove(self, pending: _Pending) -> None:
        shutil.rmtree(pending.folder, ignore_errors=True)

    def _commit(self, pending: _Pending, files: list[RankFile | None]) -> None:
        assert self._plan is not None and self._lease is not None
        try:
            about = {"format": self._form.name, "incarnation": self._lease.incarnation, "step": pending.step, "state": pending.state}
            commit.write_manifest(pending.folder, about=about, extras=self._form.extras(self._plan, files), files=files)
            commit.publish(self._lease, pending.folder, step=pending.step)
        except Exception:
            self._remove(pending)
            raise
        try:
            commit.prune(self._lease, keep=self._retention.keep, keep_every_steps=self._retention.keep_every_steps)
        except OSError as error:
            pending.note = f"older checkpoints could not be removed: {_said(error, self.root)}"

    def _conclude(self, pending: _Pending) -> None:
        """Rank 0's thread has ended: tell everybody how."""
        outcome: list[Any] = [(pending.problem or self._failure, pending.note)]
        dist.broadcast_object_list(outcome, src=self._first, group=self._group)
        problem, pending.note = outcome[0]
        self._finish(problem)

    def _finish(self, problem: str | None) -> None:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        self._failure, self._last_problem = None, problem
        seconds, stall_s = round(time.perf_counter() - pending.started, 3), round(pending.stall_s, 3)
        event: Event
        if problem is None:
            event = {"event": "checkpoint", "path": f"step_{pending.step:08d}", "seconds": seconds, "stall_s": stall_s}
        else:
            said = (
                f"the checkpoint of step {pending.step} could not be written ({problem}); training goes on, what was saved before is whole"
            )
            event = {"event": "checkpoint_failed", "step": pending.step, "reason": problem, "said": said}
        if pending.waited_s:
            event["waited_s"] = round(pending.waited_s, 3)
        if pending.note:
            event["note"] = pending.note
        self._events.append(event)


def _said(error: OSError, folder: Path) -> str:
    return f"{error.strerror or error} ({error.filename or folder})"

"""Copies of a run's state on each node's own disk (`checkpoint.local_dir`), made more often than checkpoints that all nodes see.

    local_dir/RUN/NODE/step_00000120/    __8_0.distcp ...  lengths.json  manifest.json     what the ranks of one node hold, all of it

A node's folder is written like a checkpoints folder (checkpoint/writer.py, commit.py) by the ranks of that node, under a lease of its own
that the newest start of the run takes. A copy is no checkpoint by itself: it is used when every rank finds its own part of the same copy,
whole by its hash, in the layout that wrote it, and no checkpoint is newer; otherwise all ranks go on from the checkpoint together. RUN is
drawn when the run's checkpoints folder is new, so copies of a run that was removed are never taken for those of its successor.
"""

from __future__ import annotations

import io
import json
import shutil
import socket
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megasora.checkpoint import manifests, store
from megasora.checkpoint.lease import Lease
from megasora.checkpoint.rank_file import RankFile
from megasora.checkpoint.staging import Plan, signature_of
from megasora.checkpoint.verification import damage_of
from megasora.checkpoint.writer import CheckpointWriter, Event, Retention
from megasora.config.errors import UserError
from megasora.config.files import written_whole

KEPT = 2
LENGTHS = "lengths.json"
"""Bytes of each tensor in each rank's file."""
RUN_FILE = ".run_id"
ABOUT = "run.json"
"""In local_dir/RUN: whose copies these are."""


class LocalForm:
    """Everything that each rank holds, in its own order, as only the same layout reads it."""

    name = manifests.LOCAL

    def plan(self, tensors: Mapping[str, ShardedTensor]) -> Plan:
        """See `writer.Form.plan`."""
        return Plan(signature=signature_of(tensors), names=tuple(tensors), contents=None, indices=())

    def extras(self, plan: Plan, files: Sequence[RankFile | None]) -> dict[str, bytes]:
        """See `writer.Form.extras`."""
        return {LENGTHS: json.dumps({file.name: file.lengths for file in files if file is not None}).encode()}


@dataclass(frozen=True, kw_only=True)
class Copy:
    """This rank's part of a copy."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def number(self) -> tuple[int, int]:
        """Start of the run and number of the copy in it: the same for all parts of one copy."""
        made = self.manifest["state"]["copy"]
        return int(made["start"]), int(made["number"])


class LocalCopies:
    """A run's copies; every method is called by all ranks together.

    Args:
        local_dir: on each node's own disk.
        root: the run's checkpoints folder.
        lease: rank 0's right to write there; None on the others.
        asynchronous: whether training waits for the disk.

    Attributes:
        problem: why this start makes and reads no copies; None when it does. The same on every rank.
    """

    def __init__(self, local_dir: str, *, root: Path, lease: Lease | None, asynchronous: bool) -> None:
        told: list[Any] = [(run_id(root), lease.incarnation) if lease is not None else None]
        dist.broadcast_object_list(told, src=0)
        self._run, self._start = told[0]
        self._number = 0
        group, leads, node = _node_group()
        self.folder = Path(local_dir).absolute() / self._run / node
        self._lease: Lease | None = None
        problem = None
        if leads:
            try:
                self._lease = _own_folder(self.folder, root=root)
            except (OSError, UserError) as error:
                problem = f"{node}: {error}"
        self.problem = _first_of_all(problem)
        self._writer: CheckpointWriter | None = None
        if self.problem is None:
            self._writer = CheckpointWriter(
                self.folder,
                lease=self._lease,
                asynchronous=asynchronous,
                retention=Retention(keep=KEPT),
                form=LocalForm(),
                group=group,
            )
        else:
            self.release()

    def save(self, *, step: int, tensors: Mapping[str, ShardedTensor], state: Mapping[str, Any]) -> None:
        """Start a copy; when it returns the tensors may change.

        Raises:
            UserError: another start of the run has taken the node over.
        """
        if self._writer is not None:
            self._number += 1
            made = {"run": self._run, "start": self._start, "number": self._number, "world_size": dist.get_world_size()}
            self._writer.save(step=step, tensors=tensors, state={**state, "copy": made})

    def poll(self) -> list[Event]:
        """What became of this node's copies; failures of other nodes than rank 0's are lines on their standard error.

        Raises:
            UserError: another start of the run has taken the node over.
        """
        if self._writer is None:
            return []
        events = [{**event, "event": f"local_{event['event']}"} for event in self._writer.poll()]
        for event in events:
            if "said" in event:
                event["said"] = f"the local copy of step {event['step']} could not be written ({event['reason']}); training goes on"
                if self._lease is not None and dist.get_rank() != 0:
                    print(f"megasora: {socket.gethostname()}: {event['said']}", file=sys.stderr, flush=True)
        return events

    def wait(self) -> None:
        """Return when no copy is under way on this node."""
        if self._writer is not None:
            self._writer.wait()

    def writing_since(self) -> float | None:
        """Monotonic time since which this rank writes a copy, None while it does not; for any thread."""
        return None if self._writer is None else self._writer.writing_since()

    def release(self) -> None:
        """The end of a run however it came, on this rank alone."""
        if self._writer is not None:
            self._writer.abandon()
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def newest(self, *, at_least: int, parallel: Mapping[str, Any]) -> tuple[Copy | None, str | None]:
        """The newest copy that every rank has whole, and why a newer one was passed over.

        Args:
            at_least: older ones are not looked at.
            parallel: the layout, which must be the copy's.
        """
        if self.problem is not None:
            return None, None
        own = {step: copy for step, copy in self._own(parallel).items() if step >= at_least}
        there = max((step for step, _ in store.step_folders(self.folder) if step >= at_least), default=None)
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, ({step: copy.number for step, copy in own.items()}, there))
        passed_over = None
        for step in sorted({step for numbers, _ in everybody for step in numbers}, reverse=True):
            numbers = [numbers.get(step) for numbers, _ in everybody]
            lacking = [rank for rank, number in enumerate(numbers) if number is None or number != numbers[0]]
            damage = f"rank {lacking[0]} has no part of it" if lacking else _first_of_all(_damage(own[step]))
            if damage is None:
                return own[step], passed_over
            passed_over = passed_over or f"the local copy of step {step} was passed over: {damage}"
        newest = max((step for _, step in everybody if step is not None), default=None)
        if passed_over is None and newest is not None:
            passed_over = f"the local copy of step {newest} was passed over: no rank has a whole part of it in this layout"
        return None, passed_over

    def forget_after(self, step: int) -> None:
        """The run goes on from a step: copies of later ones are of a past that it leaves."""
        if self._lease is None:
            return
        for of_step, folder in store.step_folders(self.folder):
            if of_step > step:
                with suppress(OSError):
                    folder.rename(self._lease.work / f"pruned_{folder.name}")
                    shutil.rmtree(self._lease.work / f"pruned_{folder.name}", ignore_errors=True)

    def _own(self, parallel: Mapping[str, Any]) -> dict[int, Copy]:
        """Copies with a part of this rank, of this run and layout, by step."""
        found, layout = {}, json.loads(json.dumps(dict(parallel)))
        for _, folder in store.step_folders(self.folder):
            try:
                if manifests.problem_with(folder) is not None:
                    continue
                manifest = json.loads((folder / manifests.NAME).read_text())
                if manifests.format_problem(manifest, folder) is not None or own_file() not in manifest["files"]:
                    continue
                made = manifest["state"]["copy"]
                same = (made["run"], made["world_size"], manifest["state"]["parallel"]) == (self._run, dist.get_world_size(), layout)
            except (OSError, ValueError, KeyError, TypeError, UserError):  # another version's, or damaged: no copy of ours
                continue
            if same:
                found[int(manifest["step"])] = Copy(folder=folder, manifest=manifest)
        return found


def load(copy: Copy, tensors: Mapping[str, ShardedTensor]) -> None:
    """Read this rank's part in place."""
    lengths = json.loads((copy.folder / LENGTHS).read_text())[own_file()]
    with (copy.folder / own_file()).open("rb") as file:
        for (name, sharded), length in zip(tensors.items(), lengths, strict=True):
            loaded = torch.load(io.BytesIO(file.read(length)), weights_only=True)
            assert (loaded.shape, loaded.dtype) == (sharded.data.shape, sharded.data.dtype), f"{name} is another tensor in {copy.folder}"
            sharded.data.copy_(loaded)


def own_file() -> str:
    """Name of this rank's file."""
    return f"__{dist.get_rank()}_0.distcp"


def node_name() -> str:
    """Which node this rank is on."""
    return socket.gethostname()


def run_id(root: Path) -> str:
    """A name that no other run has had, also none in this folder before it was removed; drawn for a new one."""
    path = root / RUN_FILE
    with suppress(OSError):
        if known := path.read_text().strip():
            return known
    drawn = uuid.uuid4().hex
    with written_whole(path, sync=True) as temporary:
        temporary.write_text(f"{drawn}\n")
    return drawn


def _node_group() -> tuple[dist.ProcessGroup, bool, str]:
    """The ranks of this rank's node, whether it is the first of them, the node."""
    nodes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(nodes, node_name())
    mine: dist.ProcessGroup | None = None
    for node in dict.fromkeys(nodes):
        group = dist.new_group([rank for rank, of in enumerate(nodes) if of == node], backend="gloo")
        if node == nodes[dist.get_rank()]:
            mine = group
    assert mine is not None, "every rank is on a node"
    return mine, nodes.index(nodes[dist.get_rank()]) == dist.get_rank(), nodes[dist.get_rank()]


def _own_folder(folder: Path, *, root: Path) -> Lease:
    """Take the node's folder over; who holds the run's lease holds this too. Copies of runs that were in the same place before go."""
    run = folder.parent
    for about in run.parent.glob(f"*/{ABOUT}"):
        with suppress(OSError, ValueError):
            if json.loads(about.read_text())["root"] == str(root) and about.parent != run:
                shutil.rmtree(about.parent, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    with written_whole(run / ABOUT) as temporary:
        temporary.write_text(json.dumps({"root": str(root)}))
    return Lease.take(folder, force=True)


def _damage(copy: Copy) -> str | None:
    """What is wrong with this rank's part."""
    for name in (own_file(), LENGTHS):
        if (found := damage_of(copy.folder / name, copy.manifest["files"][name])) is not None:
            return f"on {node_name()} {found}"
    return None


def _first_of_all(problem: str | None) -> str | None:
    """The first rank's problem, on every rank."""
    everybody: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, problem)
    return next((found for found in everybody if found is not None), None)

"""A run's checkpoints: who may write them, what goes in, and whether what lies there is of this run."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from megasora.checkpoint import local_copies, store
from megasora.checkpoint.lease import Lease
from megasora.checkpoint.local_copies import LocalCopies
from megasora.checkpoint.newest import Found, newest_anywhere
from megasora.checkpoint.writer import CheckpointWriter, Event, Retention
from megasora.config.errors import UserError
from megasora.config.io import to_dict
from megasora.config.run_basics import RunBasics
from megasora.config.schema import RunConfig
from megasora.data.plan import SamplerState
from megasora.models.mmdit.sharded_state import model_tensors
from megasora.parallel.agreement import on_rank_0
from megasora.parallel.groups import ParallelContext
from megasora.parallel.row_shards import reshard
from megasora.training.guard import Guard
from megasora.training.moments import moments_of, set_moments
from megasora.training.optimizer import ensure_adam_state, owned_shards, refresh_masters
from megasora.training.owned_shard import OwnedShard
from megasora.training.state import optimizer_tensors
from megasora.training.step import Trainee


class Progress(Protocol):
    """How far who is trained has come."""

    step: int
    sampler: SamplerState
    samples_seen: int


Learns = TypeVar("Learns", bound=Progress)
DECIDES_SAMPLES = ("seed", "global_tokens", "batch_size", "image_share", "data_sha256")
"""Facts of a run without which a position of its sampler means nothing."""


@contextmanager
def held_lease(root: Path, *, take_over: bool) -> Iterator[Lease | None]:
    """Rank 0's right to write a run's checkpoints while the block runs; None on the other ranks. All ranks call it together.

    Raises:
        UserError: another run has it; the same on every rank.
    """
    lease = on_rank_0(lambda: Lease.take(root, force=take_over))
    try:
        yield lease
    finally:
        if lease is not None:
            lease.release()


class RunCheckpoints(ABC, Generic[Learns]):
    """Saves and resumes a trainee; a kind of run says what goes in.

    Args:
        root: folder of the checkpoints.
        lease: rank 0's right to write there; None on the others.
        config: the run.
        context: this rank's groups.
        data_sha256: of the manifest that is trained on.
    """

    def __init__(self, root: Path, *, lease: Lease | None, config: RunBasics, context: ParallelContext, data_sha256: str) -> None:
        self.root, self.config, self.context, self.data_sha256 = root, config, context, data_sha256
        self._lease = lease
        settings = config.checkpoint
        retention = Retention(keep=settings.keep, keep_every_steps=settings.keep_every_steps)
        self._writer = CheckpointWriter(root, lease=lease, asynchronous=settings.asynchronous, retention=retention)
        self._copies: LocalCopies | None = None
        if settings.local_dir is not None:
            self._copies = LocalCopies(settings.local_dir, root=root, lease=lease, asynchronous=settings.asynchronous)

    @property
    def without_copies(self) -> str | None:
        """Why this start makes no copies on its nodes though the run asks for them; None where all is well."""
        return None if self._copies is None else self._copies.problem

    @property
    def data_key(self) -> str:
        """Eight digits for the data, the budget and the seed: positions of the sampler mean something under this key only."""
        facts = {name: value for name, value in self.same_in_a_run().items() if name in DECIDES_SAMPLES}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]

    def writing_since(self) -> float | None:
        """Monotonic time since which this rank writes a checkpoint, None while it does not; for any thread."""
        since = [self._writer.writing_since(), self._copies.writing_since() if self._copies is not None else None]
        return min((one for one in since if one is not None), default=None)

    def save(self, trainee: Learns, *, guard: Guard) -> None:
        """Start a checkpoint; `happened` tells what became of it. All ranks call it together.

        Raises:
            UserError: another run has taken over.
        """
        self._writer.save(step=trainee.step, tensors=self.tensors(trainee), state=self._state(trainee, guard))

    def copy(self, trainee: Learns, *, guard: Guard) -> None:
        """Start a copy on the nodes' own disks. All ranks call it together.

        Raises:
            UserError: another run has taken over.
        """
        if self._copies is not None:
            self._copies.save(step=trainee.step, tensors=self.tensors(trainee), state=self._state(trainee, guard))

    def happened(self, *, last: bool) -> list[Event]:
        """What was saved or failed since the last call; all ranks call it after every step. `last`: wait for what is under way.

        Raises:
            UserError: another run has taken over.
        """
        if last:
            self._wait()
        return [*self._writer.poll(), *(self._copies.poll() if self._copies is not None else ())]

    def _wait(self) -> None:
        self._writer.wait()
        if self._copies is not None:
            self._copies.wait()

    def close(self) -> None:
        """The end of a run; all ranks call it together.

        Raises:
            UserError: the last checkpoint could not be written.
        """
        self._writer.close()

    def abandon(self) -> None:
        """The end of a run however it came; a save that is under way is given up."""
        self._writer.abandon()
        if self._copies is not None:
            self._copies.release()

    def resume(self, trainee: Learns, *, guard: Guard) -> Event | None:
        """Load the newest undamaged state, if any; all ranks agree on which. Returns the event. A save under way is waited for.

        Raises:
            UserError: it is of another run, or all are damaged.
        """
        self._wait()
        found = newest_anywhere(self.root, lease=self._lease, copies=self._copies, parallel=self.layout())
        if found.folder is None:
            return None
        changed = self._changed_data(found.manifest["state"], found.folder)
        self.load(trainee, found)
        guard.restore(found.manifest["state"]["guard"])
        if self._copies is not None:
            self._copies.forget_after(trainee.step)
        data = self._begin_elsewhere(trainee, guard, changed) if changed else {}
        init = self.config.init
        given = "weights" if init.weights else "run" if init.run else None
        ignored = f"; --init.{given} is ignored" if given else ""
        note = f"resumed{' from the copies on the nodes' if found.copy is not None else ''}{ignored}"
        event = {"event": "restart", "from": found.folder.name, "step": trainee.step, "note": note, **data}
        if found.passed_over is not None:
            event["local"] = found.passed_over
        refused = [{"path": one.name, "reason": one.reason} for one in found.refused]
        return {**event, "refused": refused} if refused else event

    @abstractmethod
    def tensors(self, trainee: Learns) -> dict[str, Any]:
        """This rank's rectangles of everything that changes."""

    @abstractmethod
    def load(self, trainee: Learns, found: Found) -> None:
        """Fill the trainee from a checkpoint, or from a node's copy, and its manifest."""

    def read(self, trainee: Learns, found: Found) -> None:
        """Fill this rank's tensors."""
        fill(self.tensors(trainee), found)

    @abstractmethod
    def same_in_a_run(self) -> dict[str, Any]:
        """Facts that a run keeps; those of DECIDES_SAMPLES may change with resume_data."""

    def layout(self) -> dict[str, Any]:
        """How the run is laid out over its ranks, besides their number: a node's own copies serve the same layout alone."""
        return {}

    def own_state(self, trainee: Learns) -> dict[str, Any]:
        """What else the manifest keeps."""
        return {}

    def _state(self, trainee: Learns, guard: Guard) -> dict[str, Any]:
        """What the manifest keeps beside the tensors."""
        return {
            "recipe": self.config.recipe,
            "parallel": self.layout(),
            "sampler": asdict(trainee.sampler),
            "samples_seen": trainee.samples_seen,
            "guard": guard.state(),
            "ema_decay": self.config.optimizer.ema_decay,
            **self.own_state(trainee),
            **self.same_in_a_run(),
        }

    def _begin_elsewhere(self, trainee: Learns, guard: Guard, changed: list[str]) -> dict[str, Any]:
        """Move the sampler of a run whose data have changed; what the event says of it."""
        at = trainee.sampler
        next_epoch = at.epoch + (at.consumed > 0)
        trainee.sampler = SamplerState(epoch=next_epoch if self.config.resume_data == "epoch" else 0)
        guard.left_out.clear()  # positions in data that are no more
        return {"data": f"epoch {trainee.sampler.epoch} begins, for {' and '.join(changed)}"}

    def _changed_data(self, state: dict[str, Any], folder: Path) -> list[str]:
        """What decides which samples come, and is another than in the checkpoint; empty when the run goes on exactly.

        Raises:
            UserError: the checkpoint is of another model or format, or of other data and the run does not say how to go on.
        """
        changed = []
        for name, value in self.same_in_a_run().items():
            if state.get(name) == value:
                continue
            was, now = _first_difference(state.get(name), value)
            moves = name in DECIDES_SAMPLES
            if not moves or self.config.resume_data == "exact":
                choice = "--resume_data epoch (or restart) to go on with the new data, " if moves else ""
                raise UserError(
                    f"checkpoint {folder} has another {name} ({was}) than this run ({now}); "
                    f"use the same settings, {choice}or a new --run_dir with --init.weights {folder}"
                )
            changed.append(f"another {name}")
        if (state["ema_decay"] > 0) != (self.config.optimizer.ema_decay > 0):
            has = "has" if state["ema_decay"] > 0 else "lacks"
            raise UserError(f"checkpoint {folder} {has} an EMA; keep optimizer.ema_decay as it was")
        return changed


class Checkpoints(RunCheckpoints["Trainee"]):
    """Those of a diffusion transformer."""

    def __init__(self, root: Path, *, lease: Lease | None, config: RunConfig, context: ParallelContext, data_sha256: str) -> None:
        super().__init__(root, lease=lease, config=config, context=context, data_sha256=data_sha256)
        self.run = config

    def load(self, trainee: Trainee, found: Found) -> None:
        """See `RunCheckpoints.load`."""
        reshard(trainee.chunks)  # ZeRO-2 keeps parameters gathered after a step that did not happen
        facts = found.manifest
        ensure_adam_state(trainee.optimizer, step=facts["step"])
        shards = list(owned_shards(trainee.optimizer))
        moments = moments_of(shards)
        fill(self._tensors(trainee, shards, moments), found)
        set_moments(shards, moments)
        if trainee.megatron_config.params_dtype == torch.float32:
            refresh_masters(trainee.optimizer)
        ensure_adam_state(trainee.optimizer, step=facts["step"])
        trainee.step = facts["step"]
        trainee.sampler = SamplerState(**facts["state"]["sampler"])
        trainee.samples_seen = facts["state"]["samples_seen"]

    def tensors(self, trainee: Trainee) -> dict[str, Any]:
        """See `RunCheckpoints.tensors`. Moments below fp32 are widened copies, which live until they are written."""
        reshard(trainee.chunks)
        shards = list(owned_shards(trainee.optimizer))
        return self._tensors(trainee, shards, moments_of(shards))

    def _tensors(self, trainee: Trainee, shards: Sequence[OwnedShard], moments: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
        model, context = self.run.model, self.context
        averages = trainee.ema.averages if trainee.ema is not None else []
        return {
            **model_tensors(trainee.chunks, model=model, context=context),
            **optimizer_tensors(trainee.chunks, shards, moments=moments, averages=averages, model=model, context=context),
        }

    def layout(self) -> dict[str, Any]:
        """See `RunCheckpoints.layout`."""
        return dict(to_dict(self.run.parallel))

    def same_in_a_run(self) -> dict[str, Any]:
        """See `RunCheckpoints.same_in_a_run`."""
        config = self.run
        return {
            "model": to_dict(config.model),
            "dtype": config.precision.dtype,
            "seed": config.train.seed,
            "global_tokens": config.data.global_tokens,
            "data_sha256": self.data_sha256,
        }


def fill(tensors: dict[str, Any], found: Found) -> None:
    """Read a checkpoint, or a node's copy, into a rank's rectangles."""
    if found.copy is not None:
        local_copies.load(found.copy, tensors)
        return
    assert found.folder is not None, "there is something to load"
    store.load(found.folder, tensors)


def _first_difference(was: Any, now: Any) -> tuple[str, str]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in now:
            if was.get(key) != now[key]:
                return f"{key}={was.get(key)}", f"{key}={now[key]}"
    return str(was), str(now)

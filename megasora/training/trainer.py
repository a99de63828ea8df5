"""The loop of a run, whatever it trains: it owns what lives for the run, and what happens around its steps is in the open.

What a step is, where it starts and what else happens is said by its kinds: `diffusion.DiffusionTrainer`, `autoencoder.trainer`.
"""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import torch.distributed as dist
from torch import nn

from megasora.config.errors import UserError
from megasora.config.run_basics import RunBasics
from megasora.data.manifest import Manifest, SkippedRow
from megasora.data.plan import PlannedClip, SamplerState
from megasora.data.quarantine import Quarantine, read_failures
from megasora.parallel.groups import ParallelContext
from megasora.training.checkpoints import RunCheckpoints
from megasora.training.events import Event, due
from megasora.training.guard import Guard, LeftOut, append_left_out, read_left_out
from megasora.training.metrics import MetricsLog, StepRecord
from megasora.training.optimizer import sync_parameters
from megasora.training.vitals import Vitals

Next = Literal["step", "feed", "end"]
"""What follows a step: the next one, a feeder that starts elsewhere, nothing."""


class TrainingFailedError(UserError):
    """Training cannot go on; the last checkpoint is good."""


class StopRequest:
    """Remembers SIGTERM or SIGUSR1 (SLURM's warnings): the loop saves and ends after the running step."""

    def __init__(self) -> None:
        self.asked = False
        self.signal = "a signal to another rank"
        """Name of what asked this one."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked, self.signal = True, signal.Signals(number).name


class Learner(Protocol):
    """What the loop knows of who is trained."""

    step: int
    """Optimizer steps done."""
    sampler: SamplerState
    samples_seen: int

    @property
    def wrapped(self) -> Sequence[nn.Module]:
        """Its modules, as they are trained."""
        ...


class StepOutcome(Protocol):
    """What the loop knows of a step that was tried."""

    @property
    def skipped(self) -> Sequence[tuple[str, str]]:
        """(clip, reason) of clips that failed, of all ranks."""
        ...

    @property
    def problem(self) -> str | None:
        """Why the step did not happen; then nothing has changed."""
        ...

    @property
    def stop(self) -> bool:
        """Whether some rank was asked to stop."""
        ...


class StepFeeder(Protocol):
    """Where steps come from; a batch has at least a `plan`, a `data.plan.StepPlan`."""

    def __iter__(self) -> Iterator[Any]:
        """Steps until the last."""
        ...

    def close(self) -> None:
        """Stop working ahead."""
        ...


class Trainer(ABC):
    """One rank of a run, from its newest checkpoint or its start to its last step. A kind's constructor fills what it names.

    Args:
        config: the run.
        context: this rank's groups.
        run_dir: folder of the run.
        stop: whether the run was asked to end.
    """

    checkpoints: RunCheckpoints[Any]
    clips: tuple[PlannedClip, ...]
    log: MetricsLog
    trainee: Learner
    vitals: Vitals
    events: list[dict[str, Any]]
    """What the next step's record says happened."""

    def __init__(self, config: RunBasics, *, context: ParallelContext, run_dir: Path, stop: StopRequest) -> None:
        self.basics, self.context, self.run_dir, self.stop = config, context, run_dir, stop
        self.guard = Guard(config.guard)
        self.quarantine = self._open_quarantine(run_dir / "recovery" / "clips")
        self.applied: SamplerState | None = None
        """Position of the last step that changed the weights."""

    def begin(self, *, manifest: Manifest, unfit: Sequence[SkippedRow]) -> None:
        """Open the log, and tell what any run tells at its start: copies that cannot be made, columns and rows that are not used."""
        if self.checkpoints.without_copies is not None:
            self.events.append({"event": "local_off", "reason": self.checkpoints.without_copies})
        if manifest.unread:
            self.events.append({"event": "columns", "unread": list(manifest.unread)})
        self.events += [{"event": "unfit", "row": row.row, "reason": row.reason} for row in (*manifest.skipped, *unfit)]
        self.log = MetricsLog(
            self.run_dir,
            active=self.context.rank == 0,
            total_steps=self.basics.train.steps,
            first_step=self.trainee.step,
            interval_steps=self.basics.train.log_interval_steps,
            tensorboard=self.basics.train.tensorboard,
        )

    @abstractmethod
    def feeder(self) -> StepFeeder:
        """Steps from where the trainee stands, without those that the guard leaves out."""

    @abstractmethod
    def take_step(self, batch: Any) -> StepOutcome:
        """One optimizer step on all ranks, unless something is wrong with it."""

    @abstractmethod
    def measured(self, batch: Any, result: Any, *, seconds: float, events: list[dict[str, Any]]) -> StepRecord:
        """The record of a step."""

    @abstractmethod
    def at_steps(self, feeder: Any) -> list[Event]:
        """What happens at some steps, in its order; saving last."""

    @abstractmethod
    def greet(self) -> None:
        """Say what begins."""

    @property
    def left_out_file(self) -> Path:
        """What the run has passed over, under the key of its data."""
        return self.run_dir / "recovery" / f"left_out_{self.checkpoints.data_key}.jsonl"

    def run(self) -> None:
        """Train to the last step, or until asked to stop."""
        done, steps = self.trainee.step, self.basics.train.steps
        with self.log:
            self.greet()
            if done >= steps:
                self.log.say(f"nothing to do: {done} of {steps} steps are done; raise --train.steps to go on")
                return
            self.guard.leave_out(self._known_left_out())
            try:
                self._feed_and_train()
                self.checkpoints.close()
            except TrainingFailedError:  # on every rank alike: what is being saved is good
                self.checkpoints.happened(last=True)
                raise
            finally:
                try:
                    self.vitals.close()
                finally:
                    self.checkpoints.abandon()

    def _feed_and_train(self) -> None:
        following: Next = "feed"
        while following == "feed":
            feeder = self.feeder()
            try:
                following = self._train(feeder)
            finally:
                feeder.close()

    def _train(self, feeder: StepFeeder) -> Next:
        at_steps = self.at_steps(feeder)
        if self.trainee.step == 0 and self.applied is None:
            self._happen(due(at_steps, 0, last=False))
        started = time.perf_counter()
        self.vitals.next_step(self.trainee.step + 1)
        for batch in feeder:
            following = self._step(batch, at_steps, started=started)
            started = time.perf_counter()
            if following != "step":
                return following
            if self.trainee.step < self.basics.train.steps:
                self.vitals.next_step(self.trainee.step + 1)
        return "end"

    def _step(self, batch: Any, at_steps: Sequence[Event], *, started: float) -> Next:
        """One step, what is due after it, and its record."""
        trainee, config = self.trainee, self.basics
        self.vitals.sentry.batch([self.clips[sample].clip.id for sample in batch.plan.samples])
        result = self.take_step(batch)
        self.events += [{"event": "skip", "clip": clip, "reason": reason} for clip, reason in result.skipped]
        if result.problem is not None:
            self._leave_out(batch, problem=result.problem)
            return "feed"
        self.applied = batch.plan.position
        last = trainee.step == config.train.steps or result.stop
        self.events += self.checkpoints.happened(last=False)  # before this step's save: none is committed whose step has no record
        happening = due(at_steps, trainee.step, last=last)
        if result.stop and trainee.step < config.train.steps:  # who asks may wait for a save, and for nothing else
            happening = [event for event in happening if event.place == "save"]
        self._happen(happening)
        if last:
            self.vitals.enter("save")
            self.events += self.checkpoints.happened(last=True)
        if result.stop:
            self.events.append({"event": "stop", "reason": "SIGTERM or SIGUSR1"})
        self.events += self.vitals.after_step(trainee.step)
        seconds = time.perf_counter() - started
        events, self.events = self.events, []
        self.log.write(self.measured(batch, result, seconds=seconds, events=events))
        if result.stop:
            self.vitals.sentry.stopped(self.stop.signal)
            self.log.say(f"stopped at step {trainee.step} as asked; the same command goes on from here")
        return "end" if result.stop else "step"

    def _leave_out(self, batch: Any, *, problem: str) -> None:
        """Pass over the samples of a step that must not happen; go back where the weights are suspect.

        Raises:
            TrainingFailedError: the guard has had enough, or there is nothing to go back to.
        """
        step = self.trainee.step + 1
        answer = self.guard.bad(step)
        if answer == "stop":
            raise TrainingFailedError(
                f"{problem} at step {step}; the last checkpoint is good: lower --optimizer.lr, or look at the samples that "
                f"{self.left_out_file} names, and run the same command again"
            )
        entries = [LeftOut(position=batch.plan.position, step=step, reason=problem)]
        if answer == "go_back" and self.applied is not None:
            entries.append(LeftOut(position=self.applied, step=step - 1, reason=f"before: {problem}"))
        self.guard.leave_out(entries)
        if self.context.rank == 0:
            with suppress(OSError):  # the next checkpoint holds them too; before it, a run that goes back finds them again
                append_left_out(self.left_out_file, entries)
        clips = [self.clips[sample].clip.id for sample in batch.plan.samples]
        event = {"event": "left_out", "step": step, "reason": problem, "samples": len(clips), "clips": clips[:5]}
        self.log.say(f"step {step} left out: {problem}; {len(clips)} samples, the first {', '.join(clips[:5])}")
        self.events.append(event)
        if answer == "go_back":
            self._go_back(problem)

    def _go_back(self, problem: str) -> None:
        sync_parameters(self.trainee.wrapped)
        self.vitals.enter("save")
        self.events += self.checkpoints.happened(last=True)  # what is being saved may be what the run goes back to
        left, known = self.trainee.step, list(self.guard.left_out.values())
        resumed = self.checkpoints.resume(self.trainee, guard=self.guard)
        if resumed is None:
            raise TrainingFailedError(
                f"{problem} after step {left}, and no checkpoint to go back to; lower --optimizer.lr or --checkpoint.interval_steps"
            )
        self.guard.leave_out(known)  # of these data, which a checkpoint of other data has not: its resuming forgets all
        self.applied = None
        self.log.rewind(self.trainee.step)
        self.events.append({"event": "go_back", "from_step": left, "to": resumed["from"]})
        self.log.say(f"went back from step {left} to {resumed['from']}")

    def _known_left_out(self) -> list[LeftOut]:
        """What earlier processes of this run have passed over; rank 0 reads it for all."""
        found = [read_left_out(self.left_out_file) if self.context.rank == 0 else None]
        dist.broadcast_object_list(found, src=0)
        return found[0] or []

    def _happen(self, events: Sequence[Event]) -> None:
        if events:
            sync_parameters(self.trainee.wrapped)
        for event in events:
            self.vitals.enter(event.place)
            if (said := event.happen(self.trainee)) is not None:
                self.events.append(said)

    def _open_quarantine(self, folder: Path) -> Quarantine:
        """Rank 0 reads the failures of earlier processes for all."""
        known = [read_failures(folder) if self.context.rank == 0 else None]
        dist.broadcast_object_list(known, src=0)
        return Quarantine(folder, rank=self.context.rank, known=known[0] or {}, limit=self.basics.data.quarantine_after)

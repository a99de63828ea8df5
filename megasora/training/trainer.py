"""The run as an object: it owns what lives for the run, and its loop is in the open."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist

from megasora.checkpoint.lease import Lease
from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
from megasora.data.decoding.choice import open_decoder
from megasora.data.decoding.contract import Decoder
from megasora.data.manifest import read_manifest
from megasora.data.plan import SamplerState, plan_clips
from megasora.data.quarantine import Quarantine, read_failures
from megasora.models.encoders.bundle import load_encoders
from megasora.models.mmdit.initialization import initialize_weights
from megasora.models.mmdit.weights import fill_parameters
from megasora.parallel.groups import ParallelContext
from megasora.recovery.sentry import Sentry
from megasora.training.checkpoints import Checkpoints
from megasora.training.evaluation import Evaluator
from megasora.training.events import Copy, Evaluate, Event, Save, ShowSamples, due
from megasora.training.feed import Feeder, StepBatch
from megasora.training.guard import Guard, LeftOut, append_left_out, read_left_out
from megasora.training.metrics import MetricsLog
from megasora.training.optimizer import ensure_adam_state, refresh_masters, sync_parameters
from megasora.training.prerequisites import encoders_needed, open_training_cache
from megasora.training.profiling import open_profile
from megasora.training.start import Start, find_start
from megasora.training.step import StepResult, build_trainee, step_metrics, train_step
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


class Trainer:
    """One rank of a run, from its newest checkpoint or its start to its last step.

    Args:
        config: the run; its assets are there.
        context: this rank's groups.
        run_dir: folder of the run.
        stop: whether the run was asked to end.
        lease: rank 0's right to write checkpoints; None on the others.
        sentry: this rank's, entered.

    Raises:
        UserError: files or settings do not allow it; says the cure.
    """

    def __init__(
        self, config: RunConfig, *, context: ParallelContext, run_dir: Path, stop: StopRequest, lease: Lease | None, sentry: Sentry
    ) -> None:
        self.config, self.context, self.stop = config, context, stop
        self.vitals = Vitals(sentry, config=config, context=context, profile=open_profile(config, context=context, run_dir=run_dir))
        manifest = read_manifest(str(config.data.manifest))
        self.clips, unfit = plan_clips(manifest.clips, data=config.data, encoders=config.encoders, model=config.model)
        self.checkpoints = Checkpoints(run_dir / "checkpoints", lease=lease, config=config, context=context, data_sha256=manifest.sha256)
        sentry.watch_saves(self.checkpoints.writing_since)
        start = find_start(config, root=self.checkpoints.root)
        self.cache = open_training_cache(config)
        self.encoders = load_encoders(config.encoders, model=config.model, device=context.device, parts=encoders_needed(config))
        self.trainee = build_trainee(config, context=context)
        self.trainee.enter = self.vitals.enter
        self.guard = Guard(config.guard)
        self._left_out_file = run_dir / "recovery" / f"left_out_{self.checkpoints.data_key}.jsonl"
        self._quarantine = self._open_quarantine(run_dir / "recovery" / "clips")
        self._applied: SamplerState | None = None
        """Position of the last step that changed the weights."""
        resumed = self.checkpoints.resume(self.trainee, guard=self.guard)
        self.events = [resumed] if resumed else self._initialize(start)
        """What the next step's record says happened."""
        if self.checkpoints.without_copies is not None:
            self.events.append({"event": "local_off", "reason": self.checkpoints.without_copies})
        if manifest.unread:
            self.events.append({"event": "columns", "unread": list(manifest.unread)})
        self.events += [{"event": "unfit", "row": row.row, "reason": row.reason} for row in (*manifest.skipped, *unfit)]
        self.evaluator = self._evaluator()
        self.log = MetricsLog(
            run_dir,
            active=context.rank == 0,
            total_steps=config.train.steps,
            first_step=self.trainee.step,
            interval_steps=config.train.log_interval_steps,
            tensorboard=config.train.tensorboard,
        )

    def run(self) -> None:
        """Train to the last step, or until asked to stop."""
        done, steps = self.trainee.step, self.config.train.steps
        with self.log:
            self._greet()
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
                self.vitals.close()
                self.checkpoints.abandon()

    def _feed_and_train(self) -> None:
        following: Next = "feed"
        while following == "feed":
            feeder = self._feeder()
            try:
                following = self._train(feeder)
            finally:
                feeder.close()

    def _train(self, feeder: Feeder) -> Next:
        at_steps = self._at_steps(feeder)
        if self.trainee.step == 0 and self._applied is None:
            self._happen(due(at_steps, 0, last=False))
        started = time.perf_counter()
        self.vitals.next_step(self.trainee.step + 1)
        for batch in feeder:
            following = self._step(batch, at_steps, started=started)
            started = time.perf_counter()
            if following != "step":
                return following
            if self.trainee.step < self.config.train.steps:
                self.vitals.next_step(self.trainee.step + 1)
        return "end"

    def _step(self, batch: StepBatch, at_steps: Sequence[Event], *, started: float) -> Next:
        """One step, what is due after it, and its record."""
        trainee, config, context = self.trainee, self.config, self.context
        self.vitals.sentry.batch([self.clips[sample].clip.id for sample in batch.plan.samples])
        result = train_step(trainee, batch, config=config, context=context, guard=self.guard, stop=self.stop.asked)
        self.events += [{"event": "skip", "clip": clip, "reason": reason} for clip, reason in result.skipped]
        if result.problem is not None:
            self._leave_out(batch, result, problem=result.problem)
            return "feed"
        self._applied = batch.plan.position
        last = trainee.step == config.train.steps or result.stop
        self._happen(due(at_steps, trainee.step, last=last))
        if last:
            self.vitals.enter("save")
        self.events += self.checkpoints.happened(last=last)
        if result.stop:
            self.events.append({"event": "stop", "reason": "SIGTERM or SIGUSR1"})
        self.events += self.vitals.after_step(trainee.step)
        seconds = time.perf_counter() - started
        events, self.events = self.events, []
        self.log.write(step_metrics(trainee, batch, result, config=config, context=context, seconds=seconds, events=events))
        if result.stop:
            self.vitals.sentry.stopped(self.stop.signal)
            self.log.say(f"stopped at step {trainee.step} as asked; the same command goes on from here")
        return "end" if result.stop else "step"

    def _leave_out(self, batch: StepBatch, result: StepResult, *, problem: str) -> None:
        """Pass over the samples of a step that must not happen; go back where the weights are suspect.

        Raises:
            TrainingFailedError: the guard has had enough, or there is nothing to go back to.
        """
        step = self.trainee.step + 1
        answer = self.guard.bad(step)
        if answer == "stop":
            raise TrainingFailedError(
                f"{problem} at step {step}; the last checkpoint is good: lower --optimizer.lr, or look at the samples that "
                f"{self._left_out_file} names, and run the same command again"
            )
        entries = [LeftOut(position=batch.plan.position, step=step, reason=problem)]
        if answer == "go_back" and self._applied is not None:
            entries.append(LeftOut(position=self._applied, step=step - 1, reason=f"before: {problem}"))
        self.guard.leave_out(entries)
        if self.context.rank == 0:
            with suppress(OSError):  # the next checkpoint holds them too; before it, a run that goes back finds them again
                append_left_out(self._left_out_file, entries)
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
        left = self.trainee.step
        resumed = self.checkpoints.resume(self.trainee, guard=self.guard)
        if resumed is None:
            raise TrainingFailedError(
                f"{problem} after step {left}, and no checkpoint to go back to; lower --optimizer.lr or --checkpoint.interval_steps"
            )
        self._applied = None
        self.log.rewind(self.trainee.step)
        self.events.append({"event": "go_back", "from_step": left, "to": resumed["from"]})
        self.log.say(f"went back from step {left} to {resumed['from']}")

    def _known_left_out(self) -> list[LeftOut]:
        """What earlier processes of this run have passed over; rank 0 reads it for all."""
        found = [read_left_out(self._left_out_file) if self.context.rank == 0 else None]
        dist.broadcast_object_list(found, src=0)
        return found[0] or []

    def _happen(self, events: Sequence[Event]) -> None:
        if events:
            sync_parameters(self.trainee.wrapped)
        for event in events:
            self.vitals.enter(event.place)
            if (said := event.happen(self.trainee)) is not None:
                self.events.append(said)

    def _at_steps(self, feeder: Feeder) -> list[Event]:
        config = self.config
        events: list[Event] = []
        if self.evaluator is not None:
            events.append(Evaluate(self.evaluator, interval_steps=config.evaluation.interval_steps))
        if config.evaluation.sample_interval_steps:
            events.append(
                ShowSamples(self.trainee, config=config, context=self.context, encoders=self.encoders, feeder=feeder, log=self.log)
            )
        saving = config.checkpoint
        save = Save(self.checkpoints, guard=self.guard, interval_steps=saving.interval_steps, last=saving.save_last)
        copy = Copy(self.checkpoints, guard=self.guard, interval_steps=saving.local_interval_steps, but_at=save)
        return [*events, save, copy]

    def _initialize(self, start: Start | None) -> list[dict[str, Any]]:
        """Weights of a fresh run; the events."""
        config, trainee = self.config, self.trainee
        initialize_weights(trainee.chunks, model=config.model, context=self.context, seed=config.init.seed)
        events: list[dict[str, Any]] = []
        if start is not None:
            source = start.open(config)
            fill_parameters(trainee.chunks, source.read, known=source.shapes, model=config.model, context=self.context)
            events.append({"event": "init", "weights": start.path, "select": start.select, "notes": list(start.notes)})
        elif config.init.follows is not None:
            note = f"{config.recipe} follows {config.init.follows}: --init.run FOLDER starts from that run's weights"
            events.append({"event": "init", "weights": "random", "notes": [note]})
        refresh_masters(trainee.optimizer)
        ensure_adam_state(trainee.optimizer, step=0)
        if trainee.ema is not None:
            trainee.ema.reset()
        return events

    def _feeder(self) -> Feeder:
        return Feeder(
            self.clips,
            config=self.config,
            context=self.context,
            encoders=self.encoders,
            decoder=self._decoder(),
            cache=self.cache,
            state=self.trainee.sampler,
            first_step=self.trainee.step,
            last_step=self.config.train.steps,
            dtype=self._dtype,
            left_out=self.guard.left_out,
            quarantine=self._quarantine,
            on_exchange=lambda: self.vitals.enter("agree"),  # who waits here waits for a rank, not for a decoder
        )

    def _open_quarantine(self, folder: Path) -> Quarantine:
        """Rank 0 reads the failures of earlier processes for all."""
        known = [read_failures(folder) if self.context.rank == 0 else None]
        dist.broadcast_object_list(known, src=0)
        return Quarantine(folder, rank=self.context.rank, known=known[0] or {}, limit=self.config.data.quarantine_after)

    def _evaluator(self) -> Evaluator | None:
        config = self.config
        if not config.evaluation.interval_steps or config.data.eval_manifest is None:
            return None
        held_out = read_manifest(config.data.eval_manifest)
        clips, _ = plan_clips(held_out.clips, data=config.data, encoders=config.encoders, model=config.model)
        evaluator = Evaluator(
            clips, config=config, context=self.context, encoders=self.encoders, decoder=self._decoder(), dtype=self._dtype
        )
        if not evaluator.held_out:
            raise UserError(f"no clip of {config.data.eval_manifest} can be decoded: {evaluator.failed[0][1]}")
        return evaluator

    def _decoder(self) -> Decoder:
        data = self.config.data
        return open_decoder(data.decoder, device=self.context.device, workers=data.decode_workers, timeout_s=data.decode_timeout_s)

    @property
    def _dtype(self) -> torch.dtype:
        """Of activations."""
        dtype: torch.dtype = self.trainee.megatron_config.params_dtype
        return dtype

    def _greet(self) -> None:
        sizes, config = self.context.topology, self.config
        self.log.say(
            f"{config.recipe}: TP {sizes.tp} x PP {sizes.pp} x CP {sizes.cp} x DP {sizes.dp}{f' (VP {sizes.vp})' if sizes.vp else ''} "
            f"on {self.context.world_size} {config.device} rank(s); {len(self.clips)} clips, "
            f"steps {self.trainee.step + 1} to {config.train.steps}; {config.run_dir}"
        )
        for event in self.events:
            self.log.say("  ".join(f"{name} {value}" for name, value in event.items()))

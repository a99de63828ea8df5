"""The trainer of a diffusion transformer: what of a run is its own, beside the loop that all runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megasora.checkpoint.lease import Lease
from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
from megasora.data.decoding.choice import open_decoder
from megasora.data.decoding.contract import Decoder
from megasora.data.manifest import read_manifest
from megasora.data.plan import plan_clips
from megasora.models.encoders.bundle import load_encoders
from megasora.models.mmdit.initialization import initialize_weights
from megasora.models.mmdit.weights import fill_parameters
from megasora.parallel.groups import ParallelContext
from megasora.recovery.sentry import Sentry
from megasora.training.checkpoints import Checkpoints
from megasora.training.evaluation import Evaluator
from megasora.training.events import Copy, Evaluate, Event, Save, ShowSamples
from megasora.training.feed import Feeder, StepBatch
from megasora.training.metrics import StepMetrics
from megasora.training.optimizer import ensure_adam_state, refresh_masters
from megasora.training.prerequisites import encoders_needed, open_training_cache
from megasora.training.profiling import open_profile
from megasora.training.start import Start, find_start
from megasora.training.step import StepResult, Trainee, build_trainee, step_metrics, train_step
from megasora.training.trainer import StopRequest, Trainer
from megasora.training.vitals import Vitals


class DiffusionTrainer(Trainer):
    """See `Trainer`.

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

    trainee: Trainee

    def __init__(
        self, config: RunConfig, *, context: ParallelContext, run_dir: Path, stop: StopRequest, lease: Lease | None, sentry: Sentry
    ) -> None:
        super().__init__(config, context=context, run_dir=run_dir, stop=stop)
        self.config = config
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
        resumed = self.checkpoints.resume(self.trainee, guard=self.guard)
        self.events = [resumed] if resumed else self._initialize(start)
        self.evaluator = self._evaluator()
        self.begin(manifest=manifest, unfit=unfit)

    def take_step(self, batch: StepBatch) -> StepResult:
        """See `Trainer.take_step`."""
        return train_step(self.trainee, batch, config=self.config, context=self.context, guard=self.guard, stop=self.stop.asked)

    def measured(self, batch: StepBatch, result: StepResult, *, seconds: float, events: list[dict[str, Any]]) -> StepMetrics:
        """See `Trainer.measured`."""
        return step_metrics(self.trainee, batch, result, config=self.config, context=self.context, seconds=seconds, events=events)

    def at_steps(self, feeder: Feeder) -> list[Event]:
        """See `Trainer.at_steps`."""
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

    def feeder(self) -> Feeder:
        """See `Trainer.feeder`."""
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
            quarantine=self.quarantine,
            on_exchange=lambda: self.vitals.enter("agree"),  # who waits here waits for a rank, not for a decoder
        )

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
        self.events += [{"event": "skip_held_out", "clip": clip, "reason": reason} for clip, reason in evaluator.failed]
        return evaluator

    def _decoder(self) -> Decoder:
        data = self.config.data
        return open_decoder(data.decoder, device=self.context.device, workers=data.decode_workers, timeout_s=data.decode_timeout_s)

    @property
    def _dtype(self) -> torch.dtype:
        """Of activations."""
        dtype: torch.dtype = self.trainee.megatron_config.params_dtype
        return dtype

    def greet(self) -> None:
        """See `Trainer.greet`."""
        sizes, config = self.context.topology, self.config
        self.log.say(
            f"{config.recipe}: TP {sizes.tp} x PP {sizes.pp} x CP {sizes.cp} x DP {sizes.dp}{f' (VP {sizes.vp})' if sizes.vp else ''} "
            f"on {self.context.world_size} {config.device} rank(s); {len(self.clips)} clips, "
            f"steps {self.trainee.step + 1} to {config.train.steps}; {config.run_dir}"
        )
        for event in self.events:
            self.log.say("  ".join(f"{name} {value}" for name, value in event.items()))

"""The trainer of an autoencoder: what of a run is its own, beside the loop that all runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megasora.checkpoint.lease import Lease
from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.errors import UserError
from megasora.config.schema import OptimizerConfig
from megasora.data.decoding.choice import open_decoder
from megasora.data.decoding.contract import Decoder
from megasora.data.manifest import read_manifest
from megasora.data.plan import PlannedClip
from megasora.models.autoencoders.discriminator import smallest_side
from megasora.models.autoencoders.losses import Perceptual
from megasora.models.lpips import SMALLEST_SIDE, load_lpips
from megasora.parallel.groups import ParallelContext
from megasora.recovery.sentry import Sentry
from megasora.training.autoencoder.cached_features import FeatureFeeder
from megasora.training.autoencoder.checkpoints import AutoencoderCheckpoints
from megasora.training.autoencoder.feed import ClipBatch, ClipFeeder, held_out_clips, plan_training_clips
from megasora.training.autoencoder.network import new_discriminator, new_network, recompute_blocks
from megasora.training.autoencoder.reconstruct import Reconstruct
from megasora.training.autoencoder.start import AutoencoderStart, fill_from_run, find_autoencoder_start
from megasora.training.autoencoder.step import (
    AutoencoderMetrics,
    AutoencoderStep,
    AutoencoderTrainee,
    Learning,
    autoencoder_metrics,
    autoencoder_step,
    build_learning,
)
from megasora.training.autoencoder.teaching import build_distillation, kept_of, open_features
from megasora.training.events import Copy, Event, Save
from megasora.training.optimizer import EMA, ensure_adam_state
from megasora.training.profiling import open_profile
from megasora.training.trainer import StopRequest, Trainer
from megasora.training.vitals import Vitals


class AutoencoderTrainer(Trainer):
    """See `Trainer`.

    Args:
        config: the run; its clips are there.
        context: this rank's groups.
        run_dir: folder of the run.
        stop: whether the run was asked to end.
        lease: rank 0's right to write checkpoints; None on the others.
        sentry: this rank's, entered.

    Raises:
        UserError: files or settings do not allow it; says the cure.
    """

    trainee: AutoencoderTrainee

    def __init__(
        self,
        config: AutoencoderRunConfig,
        *,
        context: ParallelContext,
        run_dir: Path,
        stop: StopRequest,
        lease: Lease | None,
        sentry: Sentry,
    ) -> None:
        super().__init__(config, context=context, run_dir=run_dir, stop=stop)
        self.config = config
        self.vitals = Vitals(sentry, config=config, context=context, profile=open_profile(config, context=context, run_dir=run_dir))
        manifest = read_manifest(str(config.data.manifest))
        self.clips, unfit = plan_training_clips(manifest.clips, config)
        refuse_small(self.clips, config)
        root = run_dir / "checkpoints"
        self.features = open_features(config, self.clips, manifest_sha256=manifest.sha256)
        start = find_autoencoder_start(config, root=root)
        self.trainee = build_autoencoder_trainee(config, context=context, start=start)
        self.trainee.enter = self.vitals.enter
        self.checkpoints = AutoencoderCheckpoints(
            root,
            lease=lease,
            config=config,
            context=context,
            data_sha256=manifest.sha256,
            kept={"model": self.trainee.network.about, "distillation": kept_of(config)},
        )
        sentry.watch_saves(self.checkpoints.writing_since)
        resumed = self.checkpoints.resume(self.trainee, guard=self.guard)
        weights = start.checkpoint or config.init.weights or "random"
        self.events = [resumed or {"event": "init", "weights": weights, "select": start.select, "notes": list(start.notes)}]
        self.held_out = self._held_out()
        self.begin(manifest=manifest, unfit=unfit)

    def feeder(self) -> ClipFeeder | FeatureFeeder:
        """See `Trainer.feeder`."""
        feeder = ClipFeeder(
            self.clips,
            config=self.config,
            context=self.context,
            decoder=self._decoder(),
            state=self.trainee.sampler,
            first_step=self.trainee.step,
            left_out=self.guard.left_out,
            quarantine=self.quarantine,
        )
        if self.features is None:
            return feeder
        return FeatureFeeder(feeder, self.features, workers=self.config.data.decode_workers)

    def take_step(self, batch: ClipBatch) -> AutoencoderStep:
        """See `Trainer.take_step`."""
        return autoencoder_step(self.trainee, batch, config=self.config, context=self.context, guard=self.guard, stop=self.stop.asked)

    def measured(self, batch: ClipBatch, result: AutoencoderStep, *, seconds: float, events: list[dict[str, Any]]) -> AutoencoderMetrics:
        """See `Trainer.measured`."""
        return autoencoder_metrics(self.trainee, batch, result, context=self.context, seconds=seconds, events=events)

    def at_steps(self, feeder: ClipFeeder | FeatureFeeder) -> list[Event]:
        """See `Trainer.at_steps`."""
        saving = self.config.checkpoint
        save = Save(self.checkpoints, guard=self.guard, interval_steps=saving.interval_steps, last=saving.save_last)
        copy = Copy(self.checkpoints, guard=self.guard, interval_steps=saving.local_interval_steps, but_at=save)
        if not self.held_out:
            return [save, copy]
        return [Reconstruct(self.held_out, settings=self.config.evaluation, context=self.context, log=self.log), save, copy]

    def greet(self) -> None:
        """See `Trainer.greet`."""
        config = self.config
        adversary = f"discriminator from step {config.discriminator.start_step}" if config.has_discriminator else "no discriminator"
        if config.has_distillation:
            adversary += f", {config.distillation.layer} aligned with {config.distillation.cache or config.distillation.teacher}"
        name, cp = self.trainee.network.about["_class_name"], self.context.topology.cp
        sharing = f"{cp} to a clip in slabs of {config.parallel.context_parallel_axis}, " if cp > 1 else ""
        self.log.say(
            f"{config.recipe}: {name} on {self.context.world_size} {config.device} rank(s), {sharing}{adversary}; "
            f"{len(self.clips)} clips, steps {self.trainee.step + 1} to {config.train.steps}; {config.run_dir}"
        )
        for event in self.events:
            self.log.say("  ".join(f"{name} {value}" for name, value in event.items()))

    def _held_out(self) -> list[tuple[str, Tensor]]:
        config = self.config
        if not config.evaluation.interval_steps or config.data.eval_manifest is None:
            return []
        clips, _ = plan_training_clips(read_manifest(config.data.eval_manifest).clips, config)
        refuse_small(clips, config)
        return held_out_clips(clips, decoder=self._decoder(), most=config.evaluation.max_clips)

    def _decoder(self) -> Decoder:
        data = self.config.data
        return open_decoder(data.decoder, device=self.context.device, workers=data.decode_workers, timeout_s=data.decode_timeout_s)


def refuse_small(clips: tuple[PlannedClip, ...], config: AutoencoderRunConfig) -> None:
    """Refuse clips that are too small for the discriminator's or LPIPS's layers, or no whole patches where ranks share them.

    Raises:
        UserError: names the size and the cure.
    """
    least = min(min(clip.height, clip.width) for clip in clips)
    needed = smallest_side(config.discriminator.num_layers) if config.has_discriminator else 1
    if least < needed:
        layers = max(1, least.bit_length() - 2)
        raise UserError(
            f"clips of {least} pixels a side leave a discriminator of {config.discriminator.num_layers} layers less than 2 x 2 patches; "
            f"use --discriminator.num_layers {layers} or clips of {needed} pixels"
        )
    patch = 2**config.discriminator.num_layers
    wrong = [clip.height for clip in clips if clip.height % patch]
    if config.has_discriminator and config.parallel.context_parallel_size > 1 and wrong:
        raise UserError(
            f"ranks share a clip's rows in whole patches of the discriminator, {patch} pixels, and clips of {wrong[0]} rows are none; use "
            "--data.aspect square, fewer --discriminator.num_layers, or --parallel.context_parallel_size 1"
        )
    if config.loss.lpips is not None and least < min(SMALLEST_SIDE.values()):
        raise UserError(f"clips of {least} pixels a side are too small for LPIPS; use {max(SMALLEST_SIDE.values())} or more")


def build_autoencoder_trainee(config: AutoencoderRunConfig, *, context: ParallelContext, start: AutoencoderStart) -> AutoencoderTrainee:
    """Networks, optimizers, moving average and LPIPS of this rank; the weights are those of a fresh run.

    Raises:
        UserError: weights are missing, or of another autoencoder.
    """
    lpips = _lpips(config, context)
    network = new_network(
        config.autoencoder, weights=config.init.weights, load=start.fresh and start.checkpoint is None, seed=config.init.seed
    )
    if start.checkpoint is not None:
        fill_from_run(network.module, start)
    recompute_blocks(network, config.autoencoder)
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    distillation = build_distillation(config, network, device=context.device, dtype=dtype) if config.has_distillation else None
    main = _learning(network.module, config.optimizer, dtype=dtype, context=context)
    network = network.shared_by(context.replica, axis=config.parallel.context_parallel_axis)
    ema = EMA(main.optimizer, decay=config.optimizer.ema_decay) if config.optimizer.ema_decay > 0 else None
    adversary = None
    if config.has_discriminator:
        module = new_discriminator(config.discriminator)
        module.initialize(seed=config.init.seed)
        adversary = _learning(module.train(), config.discriminator.optimizer, dtype=dtype, context=context)
    trainee = AutoencoderTrainee(network=network, main=main, adversary=adversary, ema=ema, dtype=dtype, lpips=lpips)
    if distillation is not None:
        trainee.distillation = distillation
        trainee.projector = _learning(distillation.projector, config.distillation.optimizer, dtype=dtype, context=context)
    return trainee


def _learning(module: nn.Module, settings: OptimizerConfig, *, dtype: torch.dtype, context: ParallelContext) -> Learning:
    initial = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    learning = build_learning(module, settings=settings, dtype=dtype, context=context, initial=initial)
    ensure_adam_state(learning.optimizer, step=0)
    return learning


def _lpips(config: AutoencoderRunConfig, context: ParallelContext) -> Perceptual | None:
    if config.loss.lpips is None:
        return None
    return load_lpips(Path(config.loss.lpips), flag="--loss.lpips").to(context.device).distance

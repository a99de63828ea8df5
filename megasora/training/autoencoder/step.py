"""One step of an autoencoder and its discriminator on all ranks: both change, or neither does."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.schema import OptimizerConfig, ParallelConfig
from megasora.data.plan import SamplerState
from megasora.models.autoencoders.discriminator import ClipDiscriminator
from megasora.models.autoencoders.losses import Perceptual
from megasora.parallel.groups import ParallelContext
from megasora.training.autoencoder.backward import AGAINST, ALIGNED, MEASURED, Losses, backward_clip
from megasora.training.autoencoder.distillation import Distillation
from megasora.training.autoencoder.feed import ClipBatch, OwnClip, levels_of_all
from megasora.training.autoencoder.network import TrainedNetwork
from megasora.training.guard import Guard
from megasora.training.optimizer import (
    EMA,
    apply_gradients,
    build_optimizer,
    learning_rate,
    owned_shards,
    ready_gradients,
    wrap_for_training,
    zero_gradients,
)
from megasora.training.profiling import Place
from megasora.training.step import unwatched


@dataclass
class Learning:
    """A module, its optimizer (ZeRO-1 over all ranks), and the steps it has made."""

    module: nn.Module
    wrapped: list[Any]
    """In Megatron's DDP."""
    optimizer: MegatronOptimizer
    settings: OptimizerConfig
    frozen: dict[str, Tensor] = field(default_factory=dict)
    """Parameters that are not trained, by name, in fp32 on the CPU, where the module holds them rounded: they have no master in Adam."""
    steps: int = 0

    def zero(self) -> None:
        """Forget the gradients of the step before."""
        zero_gradients(self.wrapped, self.optimizer)

    def sum_gradients(self) -> None:
        """Over all ranks."""
        for one in self.wrapped:
            one.finish_grad_sync()

    def apply(self, *, norm: float) -> None:
        """Step with the gradients of this norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.steps, config=self.settings)
        apply_gradients(self.optimizer, norm=norm)
        self.steps += 1


@dataclass
class AutoencoderTrainee:
    """Everything that changes while training."""

    network: TrainedNetwork
    main: Learning
    adversary: Learning | None
    """The discriminator; None for a run without."""
    ema: EMA | None
    dtype: torch.dtype
    lpips: Perceptual | None
    distillation: Distillation | None = None
    projector: Learning | None = None
    """Of the distillation, where there is one."""
    sampler: SamplerState = field(default_factory=SamplerState)
    samples_seen: int = 0
    enter: Callable[[Place], object] = unwatched
    """Hears where a step is."""
    step: int = 0

    @property
    def wrapped(self) -> list[nn.Module]:
        """All, as they are trained."""
        return [module for learner in self.learners for module in learner.wrapped]

    @property
    def learners(self) -> list[Learning]:
        """The autoencoder, the discriminator and the projector where there are any."""
        return [learner for learner in (self.main, self.adversary, self.projector) if learner is not None]


@dataclass(frozen=True, kw_only=True)
class AutoencoderStep:
    """What all ranks know after a step."""

    means: dict[str, float]
    """Of the step's clips, by `MEASURED`."""
    grad_norm: float
    discriminator_norm: float
    counted: int
    stop: bool
    wait_s: float
    skipped: list[tuple[str, str]]
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class AutoencoderMetrics:
    """One step; a record of metrics.jsonl."""

    step: int
    loss: float
    """Weighted sum without discriminator and teacher, the mean of the step's clips; of the scale that loss.reduction says."""
    pixels: float
    """Mean distance of pixels in [-1, 1]."""
    lpips: float | None
    kl: float | None
    generator: float | None
    """-mean logits of reconstructions; None while there is no discriminator."""
    balance: float | None
    """What it was multiplied by."""
    discriminator: float | None
    logits_real: float | None
    logits_made: float | None
    cosine: float | None
    """Of the aligned features, mean relu(1 - margin - cosine); None without distillation."""
    gram: float | None
    alignment_balance: float | None
    """What their sum was multiplied by."""
    grad_norm: float
    discriminator_norm: float | None
    lr: float
    samples: int
    frames: int
    images: int
    step_time_s: float
    frames_per_s: float
    data_wait_s: float
    """Longest wait of any rank for its clips."""
    peak_memory_bytes: int
    events: list[dict[str, Any]] = field(default_factory=list)

    def line(self) -> str:
        """For the log."""
        events = "".join(f" [{event['event']}]" for event in self.events)
        adversary = "" if self.discriminator is None else f"  D {self.discriminator:.3f}"
        if self.cosine is not None:
            adversary += f"  cosine {self.cosine:.4f}  gram {self.gram:.4f}"
        return (
            f"step {self.step:>6}  loss {self.loss:.4g}  pixels {self.pixels:.4f}{adversary}  grad {self.grad_norm:.3g}  lr {self.lr:.2e}  "
            f"{self.frames_per_s:,.1f} frames/s  {self.peak_memory_bytes / 2**30:.2f} GiB  wait {self.data_wait_s:.2f} s{events}"
        )


def build_learning(
    module: nn.Module, *, settings: OptimizerConfig, dtype: torch.dtype, context: ParallelContext, initial: dict[str, Tensor]
) -> Learning:
    """A module on the run's device and in its type, with Megatron's DDP and distributed Adam.

    Args:
        module: its parameters in fp32.
        settings: of the optimizer.
        dtype: of parameters and activations.
        context: this rank's groups.
        initial: the same parameters by name, from which the fp32 masters start unrounded.
    """
    module.to(device=context.device, dtype=dtype)
    config = TransformerConfig(
        num_layers=1,  # sizes mean nothing here: Megatron's wrappers want a config
        hidden_size=8,
        num_attention_heads=1,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,  # gradients are summed over ranks; a clip's share is in its loss
        use_cpu_initialization=True,
    )
    wrapped = wrap_for_training(
        [module], config=config, parallel=ParallelConfig(overlap_grad_reduce=False, overlap_param_gather=False), context=context
    )
    optimizer = build_optimizer(wrapped, optimizer=settings, dtype=dtype)
    of: dict[Tensor, Tensor] = {parameter: initial[name] for name, parameter in module.named_parameters()}
    for shard in owned_shards(optimizer):
        shard.master.data.copy_(of[shard.parameter].reshape(-1)[shard.start : shard.stop])
    kept = [name for name, parameter in module.named_parameters() if not parameter.requires_grad and dtype != torch.float32]
    frozen = {name: initial[name].to("cpu", torch.float32) for name in kept}
    return Learning(module=module, wrapped=list(wrapped), optimizer=optimizer, settings=settings, frozen=frozen)


def autoencoder_step(
    trainee: AutoencoderTrainee, batch: ClipBatch, *, config: AutoencoderRunConfig, context: ParallelContext, guard: Guard, stop: bool
) -> AutoencoderStep:
    """One optimizer step on all ranks, unless something is wrong with its losses or its gradients."""
    trainee.enter("agree")
    counted, failed, asked, wait_s = _agree(batch, context=context, stop=stop)
    good = _good(batch, context)
    skipped = _gather_skips(batch, context) if failed else []
    active = _active(trainee, config)
    trainee.enter("forward_backward")
    for learner in trainee.learners:
        learner.zero()
    losses_of = Losses(
        settings=config.loss,
        lpips=trainee.lpips,
        adversary=config.discriminator,
        discriminator=active.module if active is not None and isinstance(active.module, ClipDiscriminator) else None,
        distillation=trainee.distillation,
    )
    sums = torch.zeros(len(MEASURED), dtype=torch.float64, device=context.device)
    for clip in good:
        levels, features = levels_of_all(clip, context), clip.features
        sums += backward_clip(trainee.network, levels, losses_of=losses_of, draws=clip.draws, share=1 / counted, features=features)
    trainee.enter("agree")
    dist.all_reduce(sums)
    means = dict(zip(MEASURED, (sums / max(counted, 1)).tolist(), strict=True))
    learners = [learner for learner in (trainee.main, active, trainee.projector) if learner is not None]
    problem, norms = _update(trainee, learners, means, guard) if counted else (None, [0.0, 0.0])
    if problem is None:
        trainee.step += 1
        trainee.sampler = batch.plan.state_after
        trainee.samples_seen += counted
    return AutoencoderStep(
        means=means,
        grad_norm=norms[0],
        discriminator_norm=norms[1] if active is not None else math.nan,
        counted=counted,
        stop=asked,
        wait_s=wait_s,
        skipped=skipped,
        problem=problem,
    )


def _active(trainee: AutoencoderTrainee, config: AutoencoderRunConfig) -> Learning | None:
    """The discriminator from the step on at which it takes part."""
    return trainee.adversary if trainee.step >= config.discriminator.start_step else None


def _update(trainee: AutoencoderTrainee, learners: list[Learning], means: dict[str, float], guard: Guard) -> tuple[str | None, list[float]]:
    """(why all weights stayed as they were, gradient norms)."""
    unknown = [math.nan, math.nan]
    problem = guard.problem_with_loss(means["objective"])
    if problem is None and not math.isfinite(means["discriminator"] + means["generator"]):
        problem = f"discriminator's loss is {means['discriminator']}, the generator's {means['generator']}"
    if problem is None and not math.isfinite(means["cosine"] + means["gram"]):
        problem = f"alignment with the teacher is {means['cosine']} and {means['gram']}"
    if problem is not None:
        return problem, unknown
    trainee.enter("optimizer")
    for learner in learners:
        learner.sum_gradients()
    norms = [ready_gradients(learner.optimizer) for learner in learners]
    problem = guard.problem_with_norm(norms[0])
    if problem is None and not all(map(math.isfinite, norms)):
        problem = f"gradient norms beside the autoencoder's are {norms[1:]}"
    if problem is not None:
        return problem, [*norms, math.nan][:2]
    for learner, norm in zip(learners, norms, strict=True):
        learner.apply(norm=norm)
    guard.good(means["objective"], norms[0])
    if trainee.ema is not None:
        trainee.ema.update()
    return None, [*norms, math.nan][:2]


def _agree(batch: ClipBatch, *, context: ParallelContext, stop: bool) -> tuple[int, int, bool, float]:
    """(clips that count, clips that failed, whether to stop, longest wait), the same on every rank, before a clip's share is used."""
    failed = sum(isinstance(clip.levels, str) for clip in batch.clips)
    decoded = sum(isinstance(clip.levels, Tensor) for clip in batch.clips)
    sums = torch.tensor([decoded, failed, float(stop)], dtype=torch.float64, device=context.device)
    longest = torch.tensor([batch.wait_s], dtype=torch.float64, device=context.device)
    dist.all_reduce(sums)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    counted, failures, asked = sums.tolist()
    return int(counted), int(failures), asked > 0, float(longest)


def _good(batch: ClipBatch, context: ParallelContext) -> list[OwnClip]:
    """The replica's clips that could be decoded, the same on each of its ranks."""
    decoded = torch.tensor([isinstance(clip.levels, Tensor) for clip in batch.clips], dtype=torch.int32, device=context.device)
    if context.replica.size() > 1:
        dist.all_reduce(decoded, group=context.replica)
    return [clip for clip, there in zip(batch.clips, decoded.tolist(), strict=True) if there]


def _gather_skips(batch: ClipBatch, context: ParallelContext) -> list[tuple[str, str]]:
    """(clip, reason) of all ranks; only called when some rank failed a clip, which all know."""
    gathered: list[Any] = [None] * context.world_size
    dist.all_gather_object(gathered, [(clip.name, clip.levels) for clip in batch.clips if isinstance(clip.levels, str)])
    return [skip for part in gathered for skip in part]


def autoencoder_metrics(
    trainee: AutoencoderTrainee,
    batch: ClipBatch,
    result: AutoencoderStep,
    *,
    context: ParallelContext,
    seconds: float,
    events: list[dict[str, Any]],
) -> AutoencoderMetrics:
    """What a step reports."""
    means, on_gpu = result.means, context.device.type == "cuda"
    acted, aligned = not math.isnan(result.discriminator_norm), trainee.distillation is not None
    return AutoencoderMetrics(
        step=trainee.step,
        loss=means["objective"],
        pixels=means["pixels"],
        lpips=means["lpips"] if trainee.lpips is not None else None,
        kl=means["kl"] if means["kl"] else None,
        **{name: means[name] if acted else None for name in AGAINST},
        **{name: means[name] if aligned else None for name in ALIGNED},
        grad_norm=result.grad_norm,
        discriminator_norm=result.discriminator_norm if acted else None,
        lr=learning_rate(max(0, trainee.main.steps - 1), config=trainee.main.settings),
        samples=result.counted,
        frames=batch.frames,
        images=batch.images,
        step_time_s=seconds,
        frames_per_s=batch.frames / seconds,
        data_wait_s=result.wait_s,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        events=events,
    )

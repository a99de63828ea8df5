"""One optimizer step on all ranks, and what changes by it.

`run` decides what happens around steps: checkpoints, evaluation, samples, the end.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from torch import nn

from megasora.config.schema import RunConfig
from megasora.data.plan import SamplerState
from megasora.models.mmdit.build import build_chunks
from megasora.models.mmdit.model import MMDiT
from megasora.models.mmdit.schedule import run_schedule
from megasora.parallel.groups import ParallelContext
from megasora.parallel.transfer import send
from megasora.perf.flops import training_flops
from megasora.perf.peaks import peak_bf16_tflops
from megasora.training.feed import StepBatch
from megasora.training.guard import Guard
from megasora.training.metrics import StepMetrics
from megasora.training.microbatch import velocity_loss
from megasora.training.optimizer import EMA, TrainingOptimizer, learning_rate, prepare_training, update_weights, zero_gradients
from megasora.training.profiling import Place


def unwatched(place: Place) -> None:
    """Nobody asks where a step is."""


@dataclass
class Trainee:
    """Everything that changes while training."""

    chunks: list[MMDiT]
    wrapped: list[nn.Module]
    """The chunks for training: in Megatron's DDP (ZeRO-1), or themselves (ZeRO-2 and 3)."""
    megatron_config: TransformerConfig
    optimizer: TrainingOptimizer
    ema: EMA | None
    step: int = 0
    """Optimizer steps done."""
    sampler: SamplerState = field(default_factory=SamplerState)
    samples_seen: int = 0
    enter: Callable[[Place], object] = unwatched
    """Hears where a step is."""


@dataclass(frozen=True, kw_only=True)
class Feeding:
    """What the step's clips cost, over all ranks."""

    wait_s: float
    """Longest wait of a rank for its clips."""
    encode_s: float
    """Longest time of a rank in the encoders."""
    frames: int
    """Frames decoded."""
    decode_s: float
    """Time of all decoding threads."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What all ranks know after a step."""

    loss: float
    grad_norm: float
    counted: int
    stop: bool
    feeding: Feeding
    skipped: list[tuple[str, str]]
    problem: str | None = None
    """Why the step did not happen; then nothing has changed."""


def build_trainee(config: RunConfig, *, context: ParallelContext) -> Trainee:
    """Model chunks, DDP, optimizer and EMA of this rank; weights are not set yet."""
    chunks, megatron_config = build_chunks(config.model, config.parallel, config.precision, context=context)
    wrapped, optimizer = prepare_training(
        chunks, config=megatron_config, parallel=config.parallel, optimizer=config.optimizer, context=context
    )
    ema = EMA(optimizer, decay=config.optimizer.ema_decay) if config.optimizer.ema_decay > 0 else None
    return Trainee(chunks=chunks, wrapped=wrapped, megatron_config=megatron_config, optimizer=optimizer, ema=ema)


def train_step(trainee: Trainee, batch: StepBatch, *, config: RunConfig, context: ParallelContext, guard: Guard, stop: bool) -> StepResult:
    """One optimizer step on all ranks, unless the guard finds something wrong with its loss or its gradients."""
    trainee.enter("forward_backward")
    zero_gradients(trainee.wrapped, trainee.optimizer)
    reports = run_schedule(
        trainee.wrapped,
        batch.batches,
        config=trainee.megatron_config,
        context=context,
        loss_function=lambda output, micro: velocity_loss(output, micro, context_rank=context.at.cp),
    )
    trainee.enter("agree")
    loss, counted, num_skipped, asked, feeding = _agree(reports, batch, context=context, stop=stop)
    skipped = _gather_skips(batch, context) if num_skipped else []
    problem, norm = _update(trainee, loss, config=config, guard=guard) if counted else (None, 0.0)
    if problem is None:
        trainee.step += 1
        trainee.sampler = batch.plan.state_after
        trainee.samples_seen += counted
    return StepResult(loss=loss, grad_norm=norm, counted=counted, stop=asked, feeding=feeding, skipped=skipped, problem=problem)


def _update(trainee: Trainee, loss: float, *, config: RunConfig, guard: Guard) -> tuple[str | None, float]:
    """(why the weights stayed as they were, gradient norm)."""
    problem = guard.problem_with_loss(loss)
    if problem is not None:
        return problem, math.nan
    trainee.enter("optimizer")
    for group in trainee.optimizer.param_groups:
        group["lr"] = learning_rate(trainee.step, config=config.optimizer)
    norm, changed = update_weights(trainee.optimizer, accept=lambda norm: guard.problem_with_norm(norm) is None)
    if not changed:
        return guard.problem_with_norm(norm), norm
    guard.good(loss, norm)
    if trainee.ema is not None:
        trainee.ema.update()
    return None, norm


def _agree(reports: list[torch.Tensor], batch: StepBatch, *, context: ParallelContext, stop: bool) -> tuple[float, int, int, bool, Feeding]:
    """(mean loss, counted samples, failed clips, whether to stop, cost of the clips), the same on every rank.

    The only place of ours where the host waits for the device within a step: the losses are summed there and read with everything else.
    """
    at = context.at
    counts_here = at.tp == 0 and at.cp == 0 and at.pp == 0
    counted = sum(micro.num_counted for micro in batch.batches) if counts_here else 0
    on_host = torch.tensor([0.0, counted, len(batch.skipped), float(stop), batch.frames, batch.decode_s], dtype=torch.float64)
    costs = torch.tensor([batch.wait_s, batch.encode_s], dtype=torch.float64)
    sums, longest = send([on_host, costs], device=context.device)
    if reports:
        sums[0] = torch.stack(reports).double().sum()
    dist.all_reduce(sums)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    total, count, failed, asked, frames, decode_s, wait_s, encode_s = torch.cat([sums, longest]).tolist()
    feeding = Feeding(wait_s=wait_s, encode_s=encode_s, frames=int(frames), decode_s=decode_s)
    return (total / count if count else math.nan), int(count), int(failed), asked > 0, feeding


def _gather_skips(batch: StepBatch, context: ParallelContext) -> list[tuple[str, str]]:
    """(clip, reason) of all ranks; only called when some rank failed a clip, which all know."""
    gathered: list[Any] = [None] * context.world_size
    dist.all_gather_object(gathered, batch.skipped)
    return [skip for part in gathered for skip in part]


def step_metrics(
    trainee: Trainee,
    batch: StepBatch,
    result: StepResult,
    *,
    config: RunConfig,
    context: ParallelContext,
    seconds: float,
    events: list[dict[str, Any]],
) -> StepMetrics:
    """What a step reports, from its batch, its result and its wall time."""
    flops = training_flops(batch.flops_tokens, hidden_size=config.model.hidden_size, num_blocks=config.model.num_blocks)
    tflops = flops / seconds / context.world_size / 1e12
    on_gpu = context.device.type == "cuda"
    peak = peak_bf16_tflops(torch.cuda.get_device_name()) if on_gpu else None
    memory = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return StepMetrics(
        step=trainee.step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=learning_rate(trainee.step - 1, config=config.optimizer),
        samples=result.counted,
        tokens=batch.tokens,
        step_time_s=seconds,
        tokens_per_s=batch.tokens / seconds,
        tflops_per_gpu=tflops,
        mfu=tflops / peak if peak else None,
        data_wait_s=result.feeding.wait_s,
        encode_s=result.feeding.encode_s,
        decode_frames_per_s=result.feeding.frames / result.feeding.decode_s if result.feeding.decode_s else None,
        pad_share=batch.balance.pad_share,
        imbalance=batch.balance.imbalance,
        peak_memory_bytes=memory,
        events=events,
    )

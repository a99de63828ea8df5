"""One rank of any job, run for real on fake tensors: `dry_run`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from torch._subclasses.fake_tensor import FakeTensorMode

from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
from megasora.config.validate import raise_on_problems
from megasora.models.mmdit.megatron_config import DTYPES
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack
from megasora.parallel.pipeline import valid_microbatch_group
from megasora.perf.flops import LAYER_KINDS, LayerFlops, PackOnRank
from megasora.scaling.dryrun.batches import packs_of, step_batch, tables_of, tensors_of
from megasora.scaling.dryrun.place import PHASES, Phase
from megasora.scaling.dryrun.recorder import Recorder
from megasora.scaling.dryrun.result import DryRun, Memory, Part
from megasora.scaling.dryrun.stand_ins import STAND_INS, gpu_stand_ins
from megasora.scaling.dryrun.state import State, state_of
from megasora.scaling.dryrun.world import fake_world
from megasora.scaling.workload import Clips, StepPacks, planned_clips, steps_of
from megasora.training.feed import StepBatch
from megasora.training.guard import Guard
from megasora.training.optimizer import ensure_adam_state, overlap_of
from megasora.training.step import Trainee, build_trainee, train_step


def dry_run(config: RunConfig, *, world_size: int, rank: int, clips: Clips = "auto") -> DryRun:
    """A training step of one rank of a job on GPUs, with everything that it computes, sends and allocates.

    The process must not be a rank of a real world; afterwards it is free for another dry run. Nothing is downloaded or written.

    Args:
        config: the run; device and layer settings are taken as a GPU's, whatever they say.
        world_size: ranks of the job.
        rank: which of them.
        clips: where the step's clips come from (`workload.planned_clips`).

    Raises:
        UserError: the layout does not fit the world, the rank is outside it, or the run has FP8 layers or moments below fp32.
    """
    refuse(config, world_size=world_size, rank=rank)
    step = steps_of(config, planned_clips(config, clips=clips), world_size=world_size)[0]
    return dry_run_step(config, step, world_size=world_size, rank=rank)


def refuse(config: RunConfig, *, world_size: int, rank: int = 0) -> None:
    """Refuse what cannot be dry-run.

    Raises:
        UserError: see `dry_run`.
    """
    if world_size < 1:
        raise UserError(f"--gpus {world_size} must be a positive number")
    raise_on_problems(config, world_size=world_size, check_memory=False)
    if not 0 <= rank < world_size:
        raise UserError(f"--rank {rank} is outside a world of {world_size} GPUs; use 0 to {world_size - 1}")
    if {config.optimizer.exp_avg_dtype, config.optimizer.exp_avg_sq_dtype} != {"fp32"}:
        raise UserError(
            "--optimizer.exp_avg_dtype and exp_avg_sq_dtype below fp32 are Transformer Engine's and have no stand-in; dry-run with fp32 "
            "for both and take the optimizer's bytes from `megasora validate`"
        )
    if config.precision.fp8 != "none":
        raise UserError(
            f"--precision.fp8 {config.precision.fp8}: FP8 layers are Transformer Engine's and have no stand-in; dry-run with "
            "--precision.fp8 none (its FLOPs and messages are the same but for padding) and take the FP8 copies from `megasora validate`"
        )


def dry_run_step(config: RunConfig, step: StepPacks, *, world_size: int, rank: int) -> DryRun:
    """`dry_run` of a step that is known."""
    started = time.monotonic()
    config = as_on_gpus(config, world_size=world_size)
    with fake_world(config, world_size=world_size, rank=rank) as context:
        packs = packs_of(config, step, context=context)
        recorder = Recorder(context, overlapping=overlapping(config))
        recorder.order, recorder.num_chunks = _forward_order(config, len(packs)), config.parallel.num_model_chunks
        with ExitStack() as stack:
            stack.enter_context(gpu_stand_ins(recorder))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(recorder)
            trainee = _build(config, context, recorder)
            batch = step_batch(config, packs, context=context, dtype=DTYPES[config.precision.dtype])
            state, inputs = state_of(trainee, zero_stage=config.parallel.zero_stage), _inputs(batch, packs)
            recorder.timeline.ignore(state.tensors)
            recorder.timeline.ignore(inputs)
            _step(trainee, batch, config=config, context=context, recorder=recorder)
        return DryRun(
            recipe=config.recipe,
            world_size=world_size,
            rank=rank,
            at=context.at,
            zero_stage=config.parallel.zero_stage,
            microbatches=tuple(_pack_on_rank(pack, context) for pack in packs),
            flops=_flops(recorder),
            bytes_moved=tuple(Part(name=phase, bytes=recorder.bytes_moved[phase]) for phase in PHASES if recorder.bytes_moved[phase]),
            messages=recorder.messages.result(),
            memory=_memory(recorder, state, inputs=sum(tensor.nbytes for tensor in inputs), zero_stage=config.parallel.zero_stage),
            timeline=tuple(recorder.timeline.events),
            operations=recorder.operations.total(),
            seconds=round(time.monotonic() - started, 3),
            stand_ins=STAND_INS,
        )


def as_on_gpus(config: RunConfig, *, world_size: int) -> RunConfig:
    """The run with the choices that it would make on GPUs written out, on the layers that fake tensors can pass."""
    parallel = config.parallel
    shards = world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    if parallel.zero_stage == 1:
        overlap = overlap_of(parallel, on_cuda=True, replicas=shards)
        parallel = replace(parallel, overlap_grad_reduce=overlap.grad_reduce, overlap_param_gather=overlap.param_gather)
    precision = replace(config.precision, provider="local", attention="torch", kernels="torch")
    return replace(config, parallel=parallel, precision=precision, device="cpu")


def overlapping(config: RunConfig) -> frozenset[tuple[str, Phase]]:
    """(group, phase) of the messages that run beside computation.

    Those of TP and Ulysses stand between two operations that need each other. Ring attention passes keys on while it attends to the ones
    it has. Interleaved schedules send while the next chunk computes; 1F1B waits.
    """
    parallel = config.parallel
    found: set[tuple[str, Phase]] = {("ring", "forward"), ("ring", "backward"), ("ring", "recompute")}
    if parallel.virtual_pipeline_model_parallel_size:
        found |= {("pp", "forward"), ("pp", "backward")}
    if parallel.zero_stage > 1:
        found |= {("dp_cp", "forward"), ("dp_cp", "backward"), ("dp_cp", "recompute")}
    if parallel.overlap_grad_reduce:
        found.add(("dp_cp", "backward"))
    if parallel.overlap_param_gather:
        found.add(("dp_cp", "forward"))
    return frozenset(found)


def _forward_order(config: RunConfig, num_microbatches: int) -> list[tuple[int, int]]:
    """(micro-batch, chunk) of the forward passes."""
    chunks, stages = config.parallel.num_model_chunks, config.parallel.pipeline_model_parallel_size
    group = valid_microbatch_group(num_microbatches, stages) if chunks > 1 else stages
    return [(microbatch, chunk) for microbatch, chunk in get_schedule_table(num_microbatches, chunks, group)]


def _build(config: RunConfig, context: ParallelContext, recorder: Recorder) -> Trainee:
    trainee = build_trainee(config, context=context)
    trainee.megatron_config.deallocate_pipeline_outputs = True  # as on a GPU; the chunks hold this very object
    ensure_adam_state(trainee.optimizer, step=0)
    recorder.products.watch(trainee.chunks)
    _past_the_first_step(trainee)
    return trainee


def _past_the_first_step(trainee: Trainee) -> None:
    """Megatron reduces nothing beside the backward pass in a run's first step, where it learns how often each gradient is added to."""
    for chunk in trainee.wrapped:
        if isinstance(chunk, DistributedDataParallel):
            for group in chunk.bucket_groups:
                group.golden_per_param_grad_ready_counts = dict.fromkeys(group.params, 1)
                group.is_first_batch = False


def _inputs(batch: StepBatch, packs: list[Pack]) -> list[torch.Tensor]:
    return [
        *(tensor for micro in batch.batches for tensor in tensors_of(micro)),
        *(table for pack in set(packs) for table in tables_of(pack)),
    ]


def _step(trainee: Trainee, batch: StepBatch, *, config: RunConfig, context: ParallelContext, recorder: Recorder) -> None:
    """The run's own step; from the gradients' sums on it is the end of the step."""
    with ExitStack() as stack:

        def passes_are_over() -> None:
            recorder.place.scheduled = False
            stack.enter_context(recorder.timeline.event("step end"))

        settings = trainee.megatron_config
        settings.finalize_model_grads_func = _then(passes_are_over, settings.finalize_model_grads_func)
        recorder.on = recorder.place.scheduled = True
        train_step(trainee, batch, config=config, context=context, guard=Guard(config.guard), stop=False)
    recorder.on = False


def _then(first: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        first()
        return function(*args, **kwargs)

    return call


def _pack_on_rank(pack: Pack, context: ParallelContext) -> PackOnRank:
    share = pack.num_text + pack.num_video
    order = pack.attention_order(context.context.members[context.context.ring_rank])
    members = [pack.attention_order(ranks).lengths for ranks in context.context.members]
    return PackOnRank(
        samples=pack.num_samples,
        num_text=pack.num_text,
        num_video=pack.num_video,
        tokens=share * pack.split.tp,
        pairs=sum(own * sum(keys) for own, *keys in zip_longest(order.lengths, *members, fillvalue=0)),
    )


def _flops(recorder: Recorder) -> tuple[LayerFlops, ...]:
    flops = recorder.products.flops
    return tuple(
        LayerFlops(kind=kind, forward=flops[kind, "forward"], backward=flops[kind, "backward"], recompute=flops[kind, "recompute"])
        for kind in LAYER_KINDS
    )


def _memory(recorder: Recorder, state: State, *, inputs: int, zero_stage: int) -> Memory:
    timeline = recorder.timeline
    phase, chunk, microbatch = timeline.peak_event
    parts = sorted(timeline.at_peak.items(), key=lambda part: -part[1])
    stays = {"gradients": timeline.before_step_end.get("gradients", 0)}
    if zero_stage == 2:
        stays["gathered weights"] = timeline.before_step_end.get("gathered weights", 0)
    beside = sum(min(size, timeline.at_peak.get(name, 0)) for name, size in stays.items())
    return Memory(
        weights=state.weights or stays.get("gathered weights", 0),
        gradients=state.gradients or stays["gradients"],
        optimizer=state.optimizer,
        ema=state.ema,
        padding=state.padding,
        inputs=inputs,
        activations=timeline.peak - beside,
        at_peak=tuple(Part(name=name, bytes=size) for name, size in parts if size),
        peak_phase=phase,
        peak_chunk=chunk,
        peak_microbatch=microbatch,
    )

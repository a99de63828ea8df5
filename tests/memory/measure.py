"""Bytes a rank of a large job allocates in a step: a dry run, or (FP8, whose layers read numbers) real tensors on emulated GPUs.

The latter runs the schedule and the layers in a fake world, without an optimizer, with the dry run's attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megasora.config.pack_tokens import FP8_ROW_MULTIPLE
from megasora.config.schema import ModelConfig, ParallelConfig, PrecisionConfig, RunConfig
from megasora.models.mmdit import build
from megasora.models.mmdit.model import ModelInputs
from megasora.models.mmdit.schedule import MicroBatch, run_schedule
from megasora.parallel import groups
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack, PackSplit, SampleShape
from megasora.perf.allocations import Allocations
from megasora.scaling.dryrun.run import dry_run
from megasora.scaling.dryrun.stand_ins import attention
from megasora.training.microbatch import velocity_loss


@dataclass(frozen=True, kw_only=True)
class Case:
    """A rank of a job and its micro-batches, all alike."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=lambda: PrecisionConfig(provider="local", attention="torch"))
    samples: tuple[SampleShape, ...]
    num_microbatches: int = 1
    stage: int = 0
    fake: bool = True
    """Real tensors serve what reads numbers: FP8 takes its scales from them."""


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """What was allocated beside parameters, gradients and the micro-batches' inputs."""

    kept: int
    """When the first backward pass began: what all forward passes until then keep."""
    peak: int
    """Ever."""


def start(case: Case) -> ParallelContext:
    """The groups of a rank of the case's stage in a fake world of one replica."""
    if dist.is_initialized():
        dist.destroy_process_group()
    size = case.parallel.model_parallel_size
    rank = case.stage * (size // case.parallel.pipeline_model_parallel_size)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    device = groups.choose_device("cuda" if case.precision.provider == "te" else "cpu")
    context = groups.initialize(case.parallel, device=device, num_attention_heads=case.model.num_attention_heads, seed=0)
    assert context.at.pp == case.stage
    return context


def pack_of(case: Case, context: ParallelContext) -> Pack:
    """The pack with its index tensors made, which needs numbers and so comes before the fake tensors."""
    split = PackSplit(tp=context.topology.tp, cp=context.topology.cp, row_multiple=FP8_ROW_MULTIPLE[case.precision.fp8])
    pack = Pack(case.samples, split=split)
    for runs in (pack.text_runs, pack.video_runs, pack.joint_runs):
        assert runs.tile_one_hot.numel() and runs.one_hot.numel()
    for ranks in (range(context.topology.cp), *([rank] for rank in range(context.topology.cp))):  # Ulysses; each member of a ring
        pack.attention_order(ranks)
    for mine in (None, [0]):
        pack.head_rows(mine)
    assert pack.positions.numel()
    return pack


def batch_of(case: Case, context: ParallelContext, pack: Pack, dtype: torch.dtype) -> MicroBatch:
    """A micro-batch of fake tensors."""
    model, at = case.model, context.at

    def empty(rows: int, width: int) -> Tensor:
        return torch.ones(rows, width, dtype=dtype)

    inputs = ModelInputs(
        img=empty(pack.num_video, model.in_channels),
        txt=empty(pack.num_text, model.text_dim),
        t=torch.ones(pack.num_samples),
        y_vec=empty(pack.num_samples, model.vec_dim),
        cond=empty(pack.num_video, model.cond_channels) if model.cond_embed else None,
    )
    last = at.pp == context.topology.pp - 1
    return MicroBatch(
        pack=pack,
        inputs=inputs if at.pp == 0 else None,
        target=empty(pack.num_video, model.in_channels) if last else None,
        weight=torch.ones(pack.num_video) if last else None,
        num_counted=pack.num_samples,
    )


def measure(rank: int, case: Case, config: RunConfig) -> Bytes:
    """Run a step of the case."""
    if case.fake:
        return dry(case, config)
    context = start(case)
    pack = pack_of(case, context)
    with (
        mock.patch.object(build, "choose_kernel", return_value=attention(lambda flops: None, make=torch.zeros_like)),
        mock.patch.object(nn.utils, "skip_init", lambda kind, *args, **kwargs: kind(*args, **kwargs)),
    ):
        return _measure(case, context, pack)


def dry(case: Case, config: RunConfig) -> Bytes:
    """The first rank of the case's stage, in a job of one replica; this process of the pool has groups of its own again afterwards."""
    dist.destroy_process_group()
    size = case.parallel.model_parallel_size
    run = dry_run(config, world_size=size, rank=case.stage * (size // case.parallel.pipeline_model_parallel_size), clips="largest")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    first = next(event for event in run.timeline if event.phase == "backward")
    return Bytes(kept=first.before, peak=run.memory.activations)


def _allocate_workspace() -> None:
    """Transformer Engine's scratch space of matrix products, 32 MiB once in a process: part of no run's activations."""
    from transformer_engine.pytorch.cpp_extensions.gemm import get_cublas_workspace

    get_cublas_workspace(None, False, False)


def _measure(case: Case, context: ParallelContext, pack: Pack) -> Bytes:
    chunks, config = build.build_chunks(case.model, case.parallel, case.precision, context=context)
    config.deallocate_pipeline_outputs = True  # as on a GPU; chunks hold this very object
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # as DDP does, once it has added it
            parameter.main_grad = torch.zeros(parameter.shape)
            parameter.grad_added_to_main_grad = False
            nn.init.normal_(parameter, std=0.1)
    if case.precision.provider == "te":
        _allocate_workspace()
    batches = [batch_of(case, context, pack, config.params_dtype) for _ in range(case.num_microbatches)]
    counted = Allocations([p for chunk in chunks for p in chunk.parameters()])
    kept: list[int] = []

    def loss(output: Tensor, batch: MicroBatch) -> Any:
        return velocity_loss(output, batch, context_rank=context.at.cp)

    with counted, _before_backward(lambda: kept.append(counted.live)):
        run_schedule(chunks, batches, config=config, context=context, loss_function=loss)
    return Bytes(kept=kept[0], peak=counted.peak)


def _before_backward(function: Callable[[], None]) -> Any:
    """Call a function before each backward pass of Megatron's schedules."""
    real = schedules.backward_step

    def backward_step(*args: Any, **kwargs: Any) -> Any:
        function()
        return real(*args, **kwargs)

    return mock.patch.object(schedules, "backward_step", backward_step)

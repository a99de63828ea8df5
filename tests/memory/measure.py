"""Bytes a rank of a large job allocates in a step, counted on fake tensors: nothing is computed and nothing is sent.

The chunk, the schedule and the layers are the run's own. What stands in: a fake process group for the world, the CPU for the GPU (sizes do
not depend on it), and an attention kernel that keeps what Transformer Engine's does (q, k, v, output, one fp32 number per token and head).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megasora.config.pack_tokens import FP8_ROW_MULTIPLE
from megasora.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megasora.models.mmdit import build
from megasora.models.mmdit.model import ModelInputs
from megasora.models.mmdit.schedule import MicroBatch, run_schedule
from megasora.parallel import groups
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import AttentionOrder, Pack, PackSplit, SampleShape
from megasora.perf.allocations import Allocations
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


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        grad = grad.contiguous()
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors[:3])


def attention(q: Tensor, k: Tensor, v: Tensor, order: AttentionOrder) -> Tensor:
    """Keeps what Transformer Engine's kernel keeps."""
    out: Tensor = _Attention.apply(*(x.contiguous() for x in (q, k, v)))
    return out


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


def measure(rank: int, case: Case) -> Bytes:
    """Run a step of the case."""
    context = start(case)
    pack = pack_of(case, context)
    with (
        mock.patch.object(build, "choose_kernel", return_value=attention),
        mock.patch.object(nn.utils, "skip_init", lambda kind, *args, **kwargs: kind(*args, **kwargs)),  # it swaps real tensors in
        FakeTensorMode(allow_non_fake_inputs=True) if case.fake else nullcontext(),
    ):
        return _measure(case, context, pack)


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
            if not case.fake:
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

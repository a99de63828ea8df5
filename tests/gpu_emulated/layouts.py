"""One training step of a small MMDiT on emulated GPUs, in any layout, provider and precision; gradients whole, on rank 0."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from megasora.checkpoint.formats.canonical import canonical_shapes
from megasora.config.pack_tokens import FP8_ROW_MULTIPLE
from megasora.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megasora.models.mmdit.build import build_chunks
from megasora.models.mmdit.schedule import MicroBatch, run_schedule
from megasora.models.mmdit.weights import collect
from megasora.parallel import groups
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack, PackSplit, SampleShape
from megasora.training.microbatch import build_microbatch, velocity_loss
from tests.gpu_emulated.extension import CALLS
from tests.parallel.layouts import fill, packs_of, training_sample

MODEL = ModelConfig(
    hidden_size=128,
    num_attention_heads=8,
    num_double_blocks=2,
    num_single_blocks=2,
    ffn_hidden_size=256,
    in_channels=16,
    patch_size=2,
    text_dim=32,
    vec_dim=16,
    time_dim=32,
    axes_dim=(4, 6, 6),
)
"""FP8 takes features in sixteens, also of a TP shard: 128 / 2, 256 / 2, 3 x 128 / 2."""
SHORT = (
    SampleShape(text_tokens=3, grid=(1, 2, 3)),
    SampleShape(text_tokens=2, grid=(2, 1, 2)),
    SampleShape(text_tokens=1, grid=(1, 1, 5)),
)
"""Twenty-one tokens: Triton's interpreter takes tens of milliseconds a token."""
UNEVEN = (
    SampleShape(text_tokens=5, grid=(2, 3, 3)),
    SampleShape(text_tokens=7, grid=(1, 5, 5)),
    SampleShape(text_tokens=3, grid=(3, 2, 4)),
    SampleShape(text_tokens=6, grid=(2, 4, 3)),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout, layers and precision."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(
        default_factory=lambda: PrecisionConfig(dtype="fp32", provider="te", attention="torch", kernels="torch")
    )
    num_microbatches: int = 2
    samples: tuple[SampleShape, ...] = UNEVEN
    forward_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a rank saw of a step."""

    loss: float
    gradients: dict[str, Tensor]
    """Whole canonical gradients; on rank 0 only."""
    gemms: dict[str, int]
    """Matrix products of Transformer Engine's layers on this rank, by precision."""
    amax_updates: int


def microbatches(case: Case, context: ParallelContext, *, dtype: torch.dtype, step: int = 0) -> list[MicroBatch]:
    """This rank's micro-batches."""
    topology, at = context.topology, context.at
    split = PackSplit(tp=topology.tp, cp=topology.cp, row_multiple=FP8_ROW_MULTIPLE[case.precision.fp8])
    batches = []
    for numbers in packs_of(len(case.samples), dp_rank=at.dp, dp_size=topology.dp, num_microbatches=case.num_microbatches):
        batches.append(
            build_microbatch(
                Pack([case.samples[n] for n in numbers], split=split, tp_rank=at.tp, cp_rank=at.cp, device=context.device),
                [training_sample(n, case.samples[n], model=MODEL, step=step) for n in numbers],
                sigma_min=1e-5,
                dtype=dtype,
                first_stage=at.pp == 0,
                last_stage=at.pp == topology.pp - 1,
            )
        )
    return batches


def start(case: Case) -> ParallelContext:
    """Groups of the case's layout on emulated GPUs."""
    device = groups.choose_device("cuda")
    assert device.type == "cuda"
    groups.start_world(device, timeout_minutes=2)
    if "transformer_engine" in sys.modules:  # there on some pools' ranks only
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()  # delayed scaling keeps what it knows of modules for the process
    return groups.initialize(case.parallel, device=device, num_attention_heads=MODEL.num_attention_heads, seed=1)


def one_step(rank: int, case: Case) -> Step:
    """Forward and backward of one step through Megatron's DDP and the run's schedule."""
    context = start(case)
    chunks, config = build_chunks(MODEL, case.parallel, case.precision, context=context)
    assert config.deallocate_pipeline_outputs
    assert config.gradient_accumulation_fusion == (case.precision.provider == "te")
    fill(list(chunks), context, MODEL)
    # without ZeRO-1, whose reduce-scatter leaves a rank the sums of its own shard only
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=False, grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(config, ddp_config, chunk, pg_collection=context.pg_collection) for chunk in chunks]
    config.finalize_model_grads_func = finalize_model_grads
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    CALLS.clear()
    reports = run_schedule(
        wrapped,
        microbatches(case, context, dtype=config.params_dtype),
        config=config,
        context=context,
        loss_function=lambda output, batch: velocity_loss(output, batch, context_rank=context.at.cp),
        forward_only=case.forward_only,
    )
    total = torch.stack(reports).sum().double() if reports else torch.zeros((), dtype=torch.float64)
    dist.all_reduce(total)
    gradients = {}
    if not case.forward_only:
        whole = collect(chunks, lambda parameter: parameter.main_grad, shapes=canonical_shapes(MODEL), model=MODEL, context=context)
        gradients = whole if rank == 0 else {}
    return Step(
        loss=float(total) / len(case.samples),
        gradients=gradients,
        gemms=dict(Counter(call.detail for call in CALLS if call.kind == "gemm")),
        amax_updates=sum(call.kind == "amax_update" for call in CALLS),
    )


def one_step_in_dirty_memory(rank: int, case: Case) -> Step:
    """`one_step` where everything that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return one_step(rank, case)  # torch fills what it allocates then (torch.utils.deterministic.fill_uninitialized_memory)
    finally:
        torch.use_deterministic_algorithms(False)


def gap(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))

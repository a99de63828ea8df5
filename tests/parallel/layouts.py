"""One training step of a small MMDiT in any layout, as canonical tensors; run by the rank pool and compared with one rank."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor, nn

from megasora.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megasora.models.mmdit.build import build_chunks
from megasora.models.mmdit.canonical import canonical_parameters
from megasora.models.mmdit.schedule import MicroBatch, run_schedule
from megasora.parallel import groups
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack, PackSplit, SampleShape
from megasora.training.microbatch import TrainingSample, build_microbatch, velocity_loss

MODEL = ModelConfig(
    hidden_size=64,
    num_attention_heads=8,
    num_double_blocks=3,
    num_single_blocks=5,
    ffn_hidden_size=256,
    in_channels=8,
    patch_size=2,
    text_dim=12,
    vec_dim=6,
    time_dim=16,
    axes_dim=(2, 2, 4),
)
UNEVEN = (
    SampleShape(text_tokens=5, grid=(2, 3, 3)),
    SampleShape(text_tokens=7, grid=(1, 5, 5)),
    SampleShape(text_tokens=3, grid=(3, 2, 4)),
    SampleShape(text_tokens=5, grid=(1, 3, 3)),
    SampleShape(text_tokens=4, grid=(2, 4, 3)),
    SampleShape(text_tokens=6, grid=(1, 7, 1)),
    SampleShape(text_tokens=5, grid=(2, 2, 5)),
    SampleShape(text_tokens=2, grid=(1, 3, 5)),
)
"""Unequal samples whose token counts divide by nothing useful."""
EVEN = (SampleShape(text_tokens=8, grid=(2, 4, 4)),) * 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout and how the step's samples fall into packs."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    num_microbatches: int = 4
    dtype: torch.dtype = torch.float64
    samples: tuple[SampleShape, ...] = UNEVEN
    zero_weight: tuple[int, ...] = ()
    mistake: str = ""
    """A seeded mistake, to show that the comparison catches it."""
    model: ModelConfig = MODEL


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank saw of a step."""

    loss: float
    grad_norm: float
    gradients: list[tuple[str, tuple[slice, ...], tuple[int, ...], Tensor]]


def canonical_values(key: str, shape: tuple[int, ...]) -> Tensor:
    """Deterministic fp64 values of a canonical tensor, from its name."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.15
    return 1.0 + values if key.endswith(".scale") else values


def fill(chunks: list[nn.Module], context: ParallelContext, model: ModelConfig = MODEL) -> None:
    """Give every parameter the canonical values."""
    for chunk in chunks:
        for _, parameter, pieces in canonical_parameters(chunk, model=model, tp_rank=context.at.tp, tp_size=context.topology.tp):
            for piece in pieces:
                piece.view(parameter.data).copy_(canonical_values(piece.key, piece.global_shape)[piece.global_slices])


def training_sample(number: int, shape: SampleShape, *, model: ModelConfig, weight: float = 1.0, step: int = 0) -> TrainingSample:
    """Deterministic content of sample `number`."""
    generator = torch.Generator().manual_seed(1000 + number + 100_000 * step)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return TrainingSample(
        tokens=draw(shape.video_tokens, model.in_channels),
        text=draw(shape.text_tokens, model.text_dim),
        vec=draw(model.vec_dim),
        cond=draw(shape.video_tokens, model.cond_channels) if model.cond_embed else None,
        t=0.1 + 0.1 * (number % 8),
        noise_key=7000 + number + 100_000 * step,
        weight=weight,
    )


def packs_of(num_samples: int, *, dp_rank: int, dp_size: int, num_microbatches: int) -> list[list[int]]:
    """Samples of each micro-batch of a replica: deliberately uneven (the first packs take more)."""
    own = list(range(num_samples))[dp_rank::dp_size]
    packs: list[list[int]] = [[] for _ in range(num_microbatches)]
    for place, number in enumerate(own):
        packs[min(place * place // max(1, len(own) - 1), num_microbatches - 1) if place < num_microbatches else place % 2].append(number)
    for pack in packs:
        if not pack:
            donor = max(packs, key=len)
            pack.append(donor.pop())
    return packs


def microbatches(case: Case, context: ParallelContext, *, step: int = 0) -> list[MicroBatch]:
    """This rank's micro-batches of a step."""
    topology, at = context.topology, context.at
    split = PackSplit(tp=topology.tp, cp=topology.cp)
    batches = []
    for numbers in packs_of(len(case.samples), dp_rank=at.dp, dp_size=topology.dp, num_microbatches=case.num_microbatches):
        samples = [
            training_sample(n, case.samples[n], model=case.model, weight=0.0 if n in case.zero_weight else 1.0, step=step) for n in numbers
        ]
        if case.mistake == "rank-dependent draw":
            samples = [replace(sample, noise_key=sample.noise_key + at.cp + 2 * at.tp) for sample in samples]
        pack = Pack([case.samples[n] for n in numbers], split=split, tp_rank=at.tp, cp_rank=at.cp)
        batches.append(
            build_microbatch(
                pack,
                samples,
                sigma_min=1e-5,
                dtype=case.dtype,
                first_stage=at.pp == 0,
                last_stage=at.pp == topology.pp - 1,
            )
        )
    return batches


def one_step(rank: int, case: Case) -> Measured:
    """Forward and backward of one step in the case's layout."""
    context = groups.initialize(case.parallel, device=torch.device("cpu"), num_attention_heads=case.model.num_attention_heads, seed=1)
    chunks, config = build_chunks(case.model, case.parallel, PrecisionConfig(dtype="fp32"), context=context, dtype=case.dtype)
    fill(chunks, context, case.model)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=False)
    wrapped = [DistributedDataParallel(config, ddp_config, chunk, pg_collection=context.pg_collection) for chunk in chunks]
    config.finalize_model_grads_func = finalize_model_grads
    _seed_mistake(case.mistake, wrapped, context)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    reports = run_schedule(
        wrapped,
        microbatches(case, context),
        config=config,
        context=context,
        loss_function=lambda output, batch: velocity_loss(output, batch, context_rank=context.at.cp),
    )
    counted = len(case.samples) - len(case.zero_weight)
    total = torch.stack(reports).sum() if reports else torch.zeros((), dtype=case.dtype)
    total = total.double()
    dist.all_reduce(total)
    gradients: list[tuple[str, tuple[slice, ...], tuple[int, ...], Tensor]] = []
    squared = torch.zeros((), dtype=torch.float64)
    for chunk in chunks:
        for _, parameter, pieces in canonical_parameters(chunk, model=case.model, tp_rank=context.at.tp, tp_size=context.topology.tp):
            gradient = parameter.main_grad
            if param_is_not_tensor_parallel_duplicate(parameter):
                squared += gradient.double().square().sum()
            for piece in pieces:
                gradients.append((piece.key, piece.global_slices, piece.global_shape, piece.view(gradient).double().clone()))
    dist.all_reduce(squared, group=context.pg_collection.mp)
    return Measured(loss=float(total) / counted, grad_norm=float(squared.sqrt()), gradients=gradients)


def _seed_mistake(mistake: str, wrapped: list[nn.Module], context: ParallelContext) -> None:
    """Break one thing on purpose."""
    first = wrapped[0].module
    if mistake == "doubled gradient":  # a replicated parameter on samples, summed over TP as if it were on tokens
        for name, parameter in first.named_parameters():
            if name.startswith("time_in"):
                parameter.sequence_parallel = True
    elif mistake == "dropped reduction":  # a bias on token shares that is not summed over TP
        for name, parameter in first.named_parameters():
            if name.endswith("proj.bias"):
                parameter.sequence_parallel = False
    elif mistake == "swapped pipeline neighbour":  # the inner stages own each other's blocks
        inner = {1: 2, 2: 1}.get(context.at.pp)
        if inner is not None:
            _take_blocks_of(first, stage=inner, context=context)


def _take_blocks_of(chunk: nn.Module, *, stage: int, context: ParallelContext) -> None:
    """Give this stage's blocks the weights another stage should have (both hold two blocks of the MODEL's eight)."""
    shift = 2 * (stage - context.at.pp)
    for block, module in [*chunk.single_blocks.items(), *chunk.double_blocks.items()]:
        for name, parameter in module.named_parameters():
            stem = "single_blocks" if block in chunk.single_blocks else "double_blocks"
            other = canonical_values(f"{stem}.{int(block) + shift}.{name}", tuple(parameter.shape))
            parameter.data.copy_(other)


def assemble(results: list[Measured]) -> dict[str, Tensor]:
    """Whole canonical gradients from every rank's pieces; replicas must agree, and every element must be covered.

    Raises:
        AssertionError: two ranks disagree about an element, or an element is covered by none.
    """
    whole: dict[str, Tensor] = {}
    for result in results:
        for key, slices, shape, value in result.gradients:
            target = whole.setdefault(key, torch.full(shape, float("nan"), dtype=torch.float64))
            known = target[slices]
            seen = ~known.isnan()
            if seen.any():
                gap = (known - value)[seen].norm() / value.norm().clamp_min(1e-300)
                assert gap < 1e-5, f"replicas of {key} differ by {gap:.1e}"
            target[slices] = value
    missing = [key for key, value in whole.items() if value.isnan().any()]
    assert not missing, f"no rank holds all of {missing[:5]}"
    return whole


def relative_gaps(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """||a - b|| / ||b|| per tensor."""
    assert actual.keys() == expected.keys()
    return {key: float((actual[key] - expected[key]).norm() / expected[key].norm().clamp_min(1e-300)) for key in expected}

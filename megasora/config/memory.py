"""Peak memory of the fullest GPU, in bytes, before any GPU is there. Pure arithmetic on the settings.

Activations are counted tensor by tensor, as the blocks save them (`models/mmdit/blocks.py`); `tests/memory` holds the sums against what the
real blocks allocate on fake tensors. Not counted: encoders that run beside training (none with data.cache), the library's own context and
buffers, fragmentation; a data sheet's 141 GB leave about 8 GB of an H200 for them.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, fields
from functools import cache, partial

from megasora.config.context_split import ulysses_factor
from megasora.config.pack_tokens import FP8_ROW_MULTIPLE, PackTokens, fullest_pack
from megasora.config.parameters import double_block_parameters, modulation_parameters, single_block_parameters
from megasora.config.pipeline_split import chunk_blocks, chunk_lengths, rank_parameters
from megasora.config.schema import ModelConfig, ParallelConfig, RunConfig

TEMPORARIES = {"none": 6.0, "selective": 3.0, "full": 7.0}
"""Gradients and temporaries of a block's backward pass beyond what it saved or computed again, in tensors [share, H] (dry runs of blocks of
the real widths: 6.02, 3.02, 7.03 for every TP)."""
ULYSSES_TEMPORARIES = {**TEMPORARIES, "selective": 5.0}
"""The same with Ulysses, which keeps queries, keys and values: selective recomputation then makes less again."""
RING_TEMPORARIES = {"none": 24.3, "selective": 23.3, "full": 25.3}
"""The same of ring attention: keys, values and their gradients in fp32, twice while they travel. Two less in a ring of two."""

MOMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Of a number of Adam's moments; an fp16 run's one scale is not counted."""
GPU_WORKSPACE = {"none": 2.5, "fp8": 5.0}
"""What kernels of a GPU need beyond that, in tensors [share, H]: attention's backward sums the gradient of the queries in fp32 (2), FP8
copies gradients both ways. Measured on an H100 (benchmarks/results/2026-11-27_gpu_h100.md): 2.0 to 2.7 in bf16, 4.8 to 5.2 in FP8."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A tensor that a block saves for its backward pass."""

    width: float
    """Numbers per token of the share; TP shares either tokens or features, so this is the same for every layout."""
    recomputed: bool = False
    """Whether `selective` frees it."""
    to_linear: bool = False
    """Saved by a linear layer alone, which keeps an FP8 copy instead under FP8."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the fullest GPU at the worst moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    """fp32 master weights and Adam's moments."""
    ema: float
    fp8_weights: float
    """FP8 copies of the block linears' weights, rowwise and transposed, kept from micro-batch to micro-batch."""
    activations: float
    """Saved for the backward passes of all micro-batches in flight."""
    working_set: float
    """What comes on top while one block runs backward: recomputed tensors, gradients, gathered tokens and weights."""
    adam_copies: float
    """What Adam's fp32 copies of moments below fp32 need beyond the room that activations have left when it steps."""
    workspace: float
    """What the kernels of a GPU need to run it."""
    stage: int
    """Pipeline stage of the GPU."""
    tokens: int
    """Tokens of its share of a pack."""
    in_flight: int
    """Micro-batches (of a chunk, when interleaved) whose activations are there at once."""

    def parts(self) -> dict[str, float]:
        """Bytes by name, largest first."""
        named = {
            field.name: float(getattr(self, field.name)) for field in fields(self) if field.name not in ("stage", "tokens", "in_flight")
        }
        return dict(sorted(named.items(), key=lambda item: -item[1]))

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts().values())


def model_state_bytes(config: RunConfig, *, world_size: int) -> float:
    """Bytes of weights, gradients, optimizer and EMA on the fullest rank; activations come on top."""
    fullest = max(rank_parameters(config.model, config.parallel))
    return sum(_state_parts(config, fullest, world_size=world_size))


def memory_estimate(config: RunConfig, *, world_size: int) -> MemoryEstimate:
    """Peak memory of the fullest GPU.

    Args:
        config: a run whose layout is sound.
        world_size: ranks of the job.

    Raises:
        UserError: the pipeline split is impossible.
    """
    stages = range(config.parallel.pipeline_model_parallel_size)
    estimates = [stage_estimate(config, stage=stage, world_size=world_size) for stage in stages]
    return max(estimates, key=lambda estimate: estimate.total)


def stage_estimate(config: RunConfig, *, stage: int, world_size: int) -> MemoryEstimate:
    """Peak memory of a GPU of one pipeline stage; see `memory_estimate`."""
    model, parallel = config.model, config.parallel
    pack = fullest_pack(config, world_size=world_size)
    tokens = share_tokens(config, pack)
    weights, gradients, optimizer, ema = _state_parts(config, rank_parameters(model, parallel)[stage], world_size=world_size)
    costs = [_chunk_bytes(config, stage, chunk, tokens, samples=pack.samples) for chunk in range(parallel.num_model_chunks)]
    activations, in_flight = peak_in_flight(
        costs, stage=stage, num_stages=parallel.pipeline_model_parallel_size, num_microbatches=pack.num_microbatches
    )
    working_set = _working_set(config, stage, tokens, samples=pack.samples)
    workspace = GPU_WORKSPACE["none" if config.precision.fp8 == "none" else "fp8"] * tokens * model.hidden_size * number_bytes(config)
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        ema=ema,
        fp8_weights=_fp8_weight_bytes(config, stage),
        activations=activations,
        working_set=working_set,
        adam_copies=max(0.0, _adam_copies(config, stage, world_size=world_size) - activations - working_set - workspace),
        workspace=workspace,
        stage=stage,
        tokens=tokens,
        in_flight=in_flight,
    )


def share_tokens(config: RunConfig, pack: PackTokens) -> int:
    """Tokens of a rank's share of a pack."""
    parallel = config.parallel
    return pack.share(
        tp=parallel.tensor_model_parallel_size,
        cp=parallel.context_parallel_size,
        row_multiple=FP8_ROW_MULTIPLE[config.precision.fp8],
    )


def _state_parts(config: RunConfig, own: float, *, world_size: int) -> tuple[float, float, float, float]:
    """Weights, gradients, optimizer, EMA of a rank's parameters (facts: bf16 2 + fp32 gradients 4, fp32 master 4, moments 8
    in fp32, EMA 4).

    With ZeRO-1 an fp32 model is its own master. With ZeRO-2 weights are gathered beside sharded masters and stay; ZeRO-3 keeps the masters
    alone and gathers block by block (`_working_set`).
    """
    parallel = config.parallel
    shards = max(1, world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size))
    weights = 0 if parallel.zero_stage == 3 else own * number_bytes(config)
    gradients = own * 4 / (1 if parallel.zero_stage == 1 else shards)
    own_master = config.precision.dtype == "fp32" and parallel.zero_stage == 1
    moments = sum(MOMENT_BYTES[getattr(config.optimizer, name)] for name in ("exp_avg_dtype", "exp_avg_sq_dtype"))
    return (
        weights,
        gradients,
        own * (moments + (0 if own_master else 4)) / shards,
        own * (4 if config.optimizer.ema_decay > 0 else 0) / shards,
    )


def _adam_copies(config: RunConfig, stage: int, *, world_size: int) -> float:
    """Bytes while the optimizer steps: FusedAdam widens all moments of a group at once (Transformer Engine 2.11, optimizers/fused_adam.py,
    `unscaled_lists`), and nearly all parameters are matrices, one group. A save widens them too, when nothing else is there."""
    narrow = sum(getattr(config.optimizer, name) != "fp32" for name in ("exp_avg_dtype", "exp_avg_sq_dtype"))
    parallel = config.parallel
    shards = max(1, world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size))
    return 4.0 * narrow * rank_parameters(config.model, parallel)[stage] / shards


def peak_in_flight(costs: list[float], *, stage: int, num_stages: int, num_microbatches: int) -> tuple[float, int]:
    """Most bytes of activations at once, and how many forward passes they belong to, in Megatron's schedules.

    Args:
        costs: bytes that a forward pass of each of the stage's chunks keeps; one chunk means 1F1B, more the interleaved schedule with
            groups of PP micro-batches (megatron/core/pipeline_parallel/schedules.py, get_pp_rank_microbatches, get_schedule_table).
        stage, num_stages: place in the pipeline.
        num_microbatches: of a step, a multiple of PP when interleaved.
    """
    chunks = len(costs)
    warmup = num_stages - stage - 1
    if chunks > 1:
        warmup = 2 * warmup + (chunks - 1) * num_stages
    forwards = [
        chunk
        for start in range(0, num_microbatches, num_stages)
        for chunk in range(chunks)
        for _ in range(min(num_stages, num_microbatches - start))
    ]
    ahead = min(warmup + 1, len(forwards))
    held = peak = sum(costs[chunk] for chunk in forwards[:ahead])
    for done, coming in zip(forwards, forwards[ahead:], strict=False):
        held += costs[coming] - costs[chunks - 1 - done]
        peak = max(peak, held)
    return peak, ahead


def saved_by_block(model: ModelConfig, *, double: bool, ulysses: bool, selective: bool, collected: bool) -> tuple[Saved, ...]:
    """What a block saves, with `selective` also what it then does not keep.

    Args:
        model: sizes.
        double: a double block (both streams together), or a single one.
        ulysses: whether tokens are exchanged on both sides of attention, which is not done a second time.
        selective: whether the block is recomputed selectively.
        collected: whether each stream's part of attention's result is a copy.
    """
    h, f = float(model.hidden_size), float(model.ffn_hidden_size)
    own, normed = Saved(width=h), Saved(width=h, recomputed=True, to_linear=True)
    attention: tuple[Saved, ...] = (Saved(width=3 * h, recomputed=not ulysses), own)  # q, k, v as the kernel takes them; its result
    if ulysses and selective:
        attention += (own,)  # the result after the exchange, from which the next layer's input is made again
    if double:
        residual, hidden, activated = Saved(width=h, recomputed=True), Saved(width=f), Saved(width=f, recomputed=True, to_linear=True)
        parts = (normed,) if collected else ()  # attention's result for the output projections
        return (own, normed, Saved(width=3 * h), *attention, *parts, own, residual, normed, hidden, activated, own)
    merged = Saved(width=h + f, recomputed=True, to_linear=True)
    return (own, normed, Saved(width=3 * h + f), *attention, merged, own)


def block_bytes(config: RunConfig, *, double: bool, mode: str, samples: int) -> float:
    """Bytes per token of the share that a block keeps for its backward pass when it is recomputed in `mode` (none, selective, full)."""
    model, number = config.model, number_bytes(config)
    if mode == "full":
        return float(model.hidden_size * number)
    shared_by = config.parallel.tensor_model_parallel_size * config.parallel.context_parallel_size
    collected = config.precision.fp8 != "none" or samples != 1 or shared_by > 1  # one sample's streams stand together: views
    ulysses = ulysses_size(config) > 1
    total = 0.0
    for tensor in saved_by_block(model, double=double, ulysses=ulysses, selective=mode == "selective", collected=collected):
        if mode == "selective" and tensor.recomputed:
            continue
        total += tensor.width * (_fp8_copy_bytes(config) if tensor.to_linear and config.precision.fp8 != "none" else number)
    norms = 8 * (2 if double else 1)  # mean and 1 / deviation of LayerNorm, fp32
    return total + norms + 4 * model.num_attention_heads  # log-sum-exp of attention, fp32


def _fp8_copy_bytes(config: RunConfig) -> float:
    """Bytes per number of the FP8 copy that Transformer Engine's linear keeps of its input (module/linear.py: one orientation survives the
    forward pass): a byte, and in blocks of 128 an fp32 scale."""
    return 1 + 4 / 128 if config.precision.fp8 in ("blockwise", "mxfp8") else 1.0


def _chunk_bytes(config: RunConfig, stage: int, chunk: int, tokens: int, *, samples: int) -> float:
    """Bytes that one forward pass of a chunk keeps on the device."""
    model, number = config.model, number_bytes(config)
    modes = block_modes(model, config.parallel, stage=stage, chunk=chunk)
    blocks = sum(count * block_bytes(config, double=double, mode=mode, samples=samples) for (double, mode), count in Counter(modes).items())
    blocks -= len(offloaded_blocks(config, stage=stage, chunk=chunk)) * block_bytes(config, double=True, mode="full", samples=samples)
    first = stage == 0 and chunk == 0
    received = 0 if first or modes[0][0] else 1  # double blocks take views of the message, single ones a copy
    final = 2 if _is_last(config, stage, chunk) else 0  # the last block's output and its norm
    rotations = 4 * model.head_dim * config.parallel.tensor_model_parallel_size  # cos and sin of K / 2 angles, fp32
    return tokens * (blocks + (received + final) * model.hidden_size * number + rotations)


def _is_last(config: RunConfig, stage: int, chunk: int) -> bool:
    """Whether a chunk holds the final layer."""
    return stage == config.parallel.pipeline_model_parallel_size - 1 and chunk == config.parallel.num_model_chunks - 1


def block_modes(model: ModelConfig, parallel: ParallelConfig, *, stage: int, chunk: int) -> list[tuple[bool, str]]:
    """(double, how it is recomputed: none, selective or full) of each block of a chunk, as `models.mmdit.stages` decides it."""
    lengths = chunk_lengths(model, parallel)
    blocks = chunk_blocks(lengths, pp_rank=stage, pp_size=parallel.pipeline_model_parallel_size, vp_stage=chunk)
    in_full = {True: parallel.recompute_double_blocks, False: parallel.recompute_single_blocks}
    if parallel.recompute == "full":
        in_full = {True: model.num_blocks, False: model.num_blocks}
    rest = "selective" if parallel.recompute == "selective" else "none"
    seen = {True: 0, False: 0}
    modes: list[tuple[bool, str]] = []
    for index in blocks:
        double = index < model.num_double_blocks
        modes.append((double, "full" if seen[double] < in_full[double] else rest))
        seen[double] += 1
    return modes


def offloaded_blocks(config: RunConfig, *, stage: int, chunk: int) -> list[int]:
    """Which of a chunk's blocks have their inputs in host memory (`models.mmdit.offload`): those recomputed in full, but for the last one
    and for one that takes parts of a received message."""
    if config.parallel.offload == "none":
        return []
    modes = block_modes(config.model, config.parallel, stage=stage, chunk=chunk)
    in_full = [place for place, (_, mode) in enumerate(modes) if mode == "full"]
    first = stage == 0 and chunk == 0
    return [place for place in in_full[:-1] if first or place > 0 or not modes[place][0]]


def host_bytes(config: RunConfig, *, world_size: int) -> float:
    """Page-locked host memory of the rank that offloads most, for the micro-batches in flight.

    torch's allocator gives each tensor the next power of two of its bytes. A double block's two inputs are taken as one: text is short, so
    the video share rounds to the same or to half of it.
    """
    if config.parallel.offload == "none":
        return 0.0
    parallel, pack = config.parallel, fullest_pack(config, world_size=world_size)
    size = 2.0 ** math.ceil(math.log2(share_tokens(config, pack) * config.model.hidden_size * number_bytes(config)))
    stages, chunks = parallel.pipeline_model_parallel_size, range(parallel.num_model_chunks)
    return max(
        peak_in_flight(
            [size * len(offloaded_blocks(config, stage=stage, chunk=chunk)) for chunk in chunks],
            stage=stage,
            num_stages=stages,
            num_microbatches=pack.num_microbatches,
        )[0]
        for stage in range(stages)
    )


def _block_bytes_of(config: RunConfig, samples: int, double: bool, mode: str) -> float:
    """`block_bytes` by position, to be remembered for a kind of block."""
    return block_bytes(config, double=double, mode=mode, samples=samples)


def _working_set(config: RunConfig, stage: int, tokens: int, *, samples: int) -> float:
    """Bytes on top of everything kept at the worst moment of a backward pass: it starts with the last block, and frees what each kept."""
    model, parallel = config.model, config.parallel
    number, tp = number_bytes(config), parallel.tensor_model_parallel_size
    one = tokens * model.hidden_size * number
    worst = 0.0
    of_block = cache(partial(_block_bytes_of, config, samples))
    for chunk in range(parallel.num_model_chunks):
        freed, modes = 0.0, block_modes(model, parallel, stage=stage, chunk=chunk)
        offloaded = set(offloaded_blocks(config, stage=stage, chunk=chunk))
        for place, (double, mode) in reversed(list(enumerate(modes))):
            kept = tokens * of_block(double, mode)
            again = tokens * of_block(double, "none") - kept
            weights = double_block_parameters(model) if double else single_block_parameters(model)
            gathered = weights / tp * _gathered_bytes(config, mode)
            at_attention = again + _temporaries(config, mode) * one
            at_output = _at_output_projection(config, stage, mode, again=again, one=one) if tp > 1 and not double else 0.0
            fetched = (place in offloaded) * kept + bool(offloaded and min(offloaded) < place) * (mode == "full") * one
            worst = max(worst, max(at_attention, at_output) + gathered + fetched - freed)
            freed += 0 if place in offloaded else kept
            if offloaded and place == len(modes) - 1 and _is_last(config, stage, chunk):
                freed += (
                    2 * one
                )  # the final layer's; where inputs are kept the last block is the worst, or a gathered one is (`_gathered_bytes`)
    if parallel.pipeline_model_parallel_size > 1:
        worst += (4 if parallel.num_model_chunks > 1 else 2) * one  # gradients received and on their way
    return worst


def _gathered_bytes(config: RunConfig, mode: str) -> float:
    """Bytes beside the state for each of a block's parameters with ZeRO-2 and ZeRO-3, at the worst moment (dry runs).

    That is at the first block to run backward, with its gradients (ZeRO-2) or its weights and the next block's (ZeRO-3). Where blocks keep
    their inputs alone it is a later one, while the fp32 gradient of the block before it is on its way.
    """
    number, zero_stage = number_bytes(config), config.parallel.zero_stage
    if zero_stage == 1:
        return 0.0
    return float(number + 4 if mode == "full" else number * (zero_stage - 1))


def _temporaries(config: RunConfig, mode: str) -> float:
    """Of a block's attention, where its backward pass holds most."""
    ulysses = ulysses_size(config)
    ring = config.parallel.context_parallel_size // ulysses
    if ring > 1:
        return RING_TEMPORARIES[mode] - (2 if ring == 2 else 0)
    return (ULYSSES_TEMPORARIES if ulysses > 1 else TEMPORARIES)[mode]


def _at_output_projection(config: RunConfig, stage: int, mode: str, *, again: float, one: float) -> float:
    """Bytes on top when `linear2` of a single block runs backward: the output's gradient gathered over TP, the input's, the weight's."""
    model, parallel = config.model, config.parallel
    h, tp = model.hidden_size, parallel.tensor_model_parallel_size
    merged = (h + model.ffn_hidden_size) / h
    remade = {"none": 0.0, "selective": (merged - (1 if ulysses_size(config) > 1 else 0)) * one, "full": again + one}[mode]
    freed = 2 if stage == parallel.pipeline_model_parallel_size - 1 else 0  # the final layer's
    return remade + (tp + merged - freed) * one + merged * h * h / tp * number_bytes(config)


def ulysses_size(config: RunConfig) -> int:
    """Context ranks that exchange heads; CP / this many pass keys and values around."""
    parallel = config.parallel
    return ulysses_factor(
        backend=parallel.context_parallel_backend,
        ulysses_size=parallel.ulysses_size,
        context_parallel_size=parallel.context_parallel_size,
        heads_per_tp_rank=config.model.num_attention_heads // parallel.tensor_model_parallel_size,
    )


def number_bytes(config: RunConfig) -> int:
    """Bytes of one activation."""
    return 4 if config.precision.dtype == "fp32" else 2


def _fp8_weight_bytes(config: RunConfig, stage: int) -> float:
    """Transformer Engine keeps a weight in FP8 twice, as Hopper's products read it from both sides (get_weight_workspace)."""
    if config.precision.fp8 == "none":
        return 0.0
    model, parallel = config.model, config.parallel
    counts = {True: double_block_parameters(model), False: single_block_parameters(model)}
    modulation = modulation_parameters(model) / (model.num_double_blocks * 12 + model.num_single_blocks * 3)
    blocks = [double for chunk in range(parallel.num_model_chunks) for double, _ in block_modes(model, parallel, stage=stage, chunk=chunk)]
    return 2 * sum(counts[double] - modulation * (12 if double else 3) for double in blocks) / parallel.tensor_model_parallel_size

"""A rank's step from closed forms, to hold the dry run against: FLOPs and bytes of messages exactly, memory as `config.memory` says.

All that is taken from the run itself is its place and its packs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from megasora.config.memory import block_modes, number_bytes, stage_estimate, ulysses_size
from megasora.config.parameters import ParameterShape, parameter_shapes
from megasora.config.schema import RunConfig
from megasora.parallel.topology import Coordinates
from megasora.perf.buckets import Bucket, bucket_size, lay_out
from megasora.perf.collectives import (
    GroupSizes,
    StageShape,
    Traffic,
    fully_sharded_traffic,
    pipeline_traffic,
    recompute_traffic,
    ring_traffic,
    step_end_traffic,
    tensor_parallel_traffic,
    ulysses_traffic,
)
from megasora.perf.flops import LayerFlops, PackOnRank, add_flops, rank_flops
from megasora.scaling.dryrun.result import DryRun, Part

GRAD_ITEMSIZE = 4
"""Gradients are summed in fp32."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A number of the dry run beside the closed form's."""

    name: str
    counted: int
    computed: int
    unit: str = "bytes"

    @property
    def gap(self) -> float:
        """Relative difference."""
        return abs(self.counted - self.computed) / max(1, self.computed)


class RankStep(Protocol):
    """A rank's place and packs: what closed forms are computed from. A dry run is one."""

    @property
    def world_size(self) -> int: ...

    @property
    def at(self) -> Coordinates: ...

    @property
    def zero_stage(self) -> int: ...

    @property
    def microbatches(self) -> tuple[PackOnRank, ...]: ...


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    stage: StageShape
    recomputed: tuple[int, int]
    """Double and single blocks in full."""


def compare(run: DryRun, config: RunConfig) -> tuple[Compared, ...]:
    """Everything that has a closed form."""
    flops = {layer.kind: layer for layer in expected_flops(run, config)}
    found = [
        Compared(name=f"{layer.kind} {name}", counted=getattr(layer, name), computed=getattr(flops[layer.kind], name), unit="FLOPs")
        for layer in run.flops
        if layer.kind != "other"
        for name in ("forward", "backward", "recompute")
    ]
    sent: Counter[tuple[str, str]] = Counter()
    for message in run.messages:
        if message.kind != "receive":
            sent[message.group, message.kind] += message.bytes
    wanted = expected_messages(run, config)
    for group, kind in sorted(sent.keys() | wanted.keys()):
        found.append(Compared(name=f"{kind} {group}", counted=sent[group, kind], computed=wanted.get((group, kind), 0)))
    return (*found, *compare_memory(run, config))


def compare_memory(run: DryRun, config: RunConfig) -> tuple[Compared, ...]:
    """State beside the closed form of the rank's own shard, activations beside the estimate of `config.memory` (of a replica whose packs
    are the fullest that the settings allow)."""
    memory, estimate = run.memory, stage_estimate(config, stage=run.at.pp, world_size=run.world_size)
    state = expected_state(run, config)
    found = [Compared(name=part.name, counted=getattr(memory, part.name), computed=part.bytes) for part in state]
    most = round(estimate.activations + estimate.working_set)
    return (*found, Compared(name="activations", counted=memory.activations, computed=most))


def expected_state(run: RankStep, config: RunConfig) -> tuple[Part, ...]:
    """Weights, gradients, optimizer, EMA and padding of the rank, from the layout alone."""
    parallel, number = config.parallel, number_bytes(config)
    shards = shards_of(run, config)
    rank = run.at.dp * parallel.context_parallel_size + run.at.cp
    shapes = [shape for chunk in _chunks(config, run.at.pp) for part in _parameters(chunk.stage, config) for shape in part]
    own = sum(shape.elements for shape in shapes)
    if parallel.zero_stage == 1:
        buckets = [bucket for number_ in range(parallel.num_model_chunks) for bucket in _buckets(run, config, number_)]
        held, padding = sum(bucket.held(rank, shards) for bucket in buckets), sum(bucket.end - bucket.start for bucket in buckets) - own
        masters = 0 if config.precision.dtype == "fp32" else 4
        sizes = {"weights": number * own, "gradients": 4 * own, "optimizer": (8 + masters) * held, "padding": padding * (number + 4)}
    else:
        held = sum(shape.held(rank, shards) for shape in shapes)
        gathered = sum(-(-shape.rows // shards) * shards * shape.width for shape in shapes) if shards > 1 else own
        reduced = sum(shape.held(0, shards) for shape in shapes)  # rows are padded to the first rank's share
        sizes = {"weights": number * gathered if parallel.zero_stage == 2 else 0, "gradients": 4 * reduced, "optimizer": 12 * held}
    sizes["ema"] = 4 * held if config.optimizer.ema_decay > 0 else 0
    return tuple(Part(name=name, bytes=size) for name, size in sizes.items())


def _buckets(run: RankStep, config: RunConfig, number: int) -> list[Bucket]:
    """Of a chunk's gradient buffer."""
    chunk = _chunks(config, run.at.pp)[number]
    blocks, rest = _parameters(chunk.stage, config)
    last = parameter_shapes(config.model, "last", tp=config.parallel.tensor_model_parallel_size) if chunk.stage.post_process else []
    first = rest[: len(rest) - len(last)]
    size = bucket_size(
        shards=shards_of(run, config),
        overlap=config.parallel.overlap_grad_reduce is not False and shards_of(run, config) > 1,
        first_stage=run.at.pp == 0,
        first_chunk=number == 0,
    )
    return lay_out([shape.elements for shape in (*first, *blocks, *last)], shards=shards_of(run, config), bucket_size=size)


def expected_flops(run: RankStep, config: RunConfig) -> tuple[LayerFlops, ...]:
    """FLOPs of the rank's step by kind."""
    tp, ulysses = config.parallel.tensor_model_parallel_size, ulysses_size(config)
    return add_flops(
        rank_flops(chunk.stage, pack, model=config.model, tp=tp, ulysses=ulysses, recomputed=chunk.recomputed)
        for chunk in _chunks(config, run.at.pp)
        for pack in run.microbatches
    )


def expected_messages(run: RankStep, config: RunConfig) -> dict[tuple[str, str], int]:
    """Bytes by (group, kind); receives are the other end of sends."""
    found: Counter[tuple[str, str]] = Counter()
    chunks = _chunks(config, run.at.pp)
    for chunk in chunks:
        for pack in run.microbatches:
            for group, traffic in _of_pass(chunk, pack, config).items():
                _count(found, group, traffic)
    for number, chunk in enumerate(chunks):
        for group, traffic in _of_step_end(chunk, number, run, config).items():
            _count(found, group, traffic)
    if run.world_size > 1:
        found["world", "all_reduce"] += 6 * 8 + 2 * 8 + (4 if run.zero_stage == 1 else 8)  # `training.step._agree`, the gradient norm
    if config.parallel.pipeline_model_parallel_size > 1:
        found["pp", "broadcast"] += 4
    return {key: size for key, size in found.items() if size}


def _count(found: Counter[tuple[str, str]], group: str, traffic: Traffic) -> None:
    for kind in Traffic.__dataclass_fields__:
        found[group, kind] += getattr(traffic, kind)


def _chunks(config: RunConfig, stage: int) -> list[_Chunk]:
    """The stage's chunks."""
    parallel = config.parallel
    found = []
    for number in range(parallel.num_model_chunks):
        modes = block_modes(config.model, parallel, stage=stage, chunk=number)
        shape = StageShape(
            num_double=sum(double for double, _ in modes),
            num_single=sum(not double for double, _ in modes),
            pre_process=stage == 0 and number == 0,
            post_process=stage == parallel.pipeline_model_parallel_size - 1 and number == parallel.num_model_chunks - 1,
        )
        full = [double for double, mode in modes if mode == "full"]
        found.append(_Chunk(stage=shape, recomputed=(sum(full), len(full) - sum(full))))
    return found


def _of_pass(chunk: _Chunk, pack: PackOnRank, config: RunConfig) -> dict[str, Traffic]:
    """Forward and backward of a micro-batch, by group."""
    parallel, model, itemsize = config.parallel, config.model, number_bytes(config)
    tp, ulysses = parallel.tensor_model_parallel_size, ulysses_size(config)
    ring = parallel.context_parallel_size // ulysses
    sizes = {"model": model, "tp": tp, "tokens": pack.tokens, "itemsize": itemsize}
    stage, again_blocks = chunk.stage, StageShape(num_double=chunk.recomputed[0], num_single=chunk.recomputed[1])
    again = recompute_traffic(
        again_blocks,
        model=model,
        sizes=GroupSizes(tp=tp, ulysses=ulysses, ring=ring),
        tokens=pack.tokens,
        samples=pack.samples,
        itemsize=itemsize,
    )
    forward_again = {
        "tp": Traffic(all_gather=again.all_gather, reduce_scatter=again.reduce_scatter),
        "ulysses": Traffic(all_to_all=again.all_to_all),
        "ring": Traffic(send=again.send),
    }
    between = pipeline_traffic(
        model=model,
        share_tokens=pack.num_text + pack.num_video,
        samples=pack.samples,
        forward=not stage.post_process,
        backward=not stage.pre_process,
        itemsize=itemsize,
    )
    return {
        "tp": tensor_parallel_traffic(stage, samples=pack.samples, **sizes) + forward_again["tp"],  # type: ignore[arg-type]
        "ulysses": ulysses_traffic(stage, size=ulysses, **sizes) + forward_again["ulysses"],  # type: ignore[arg-type]
        "ring": ring_traffic(stage, size=ring, grad_itemsize=4, **sizes) + forward_again["ring"],  # type: ignore[arg-type]
        "pp": between,
    }


def _of_step_end(chunk: _Chunk, number: int, run: RankStep, config: RunConfig) -> dict[str, Traffic]:
    """Gradients and weights of a chunk, once a step or (ZeRO-2 and ZeRO-3) once a micro-batch; the number of samples with chunk 0."""
    parallel, model, itemsize = config.parallel, config.model, number_bytes(config)
    tp, shards = parallel.tensor_model_parallel_size, shards_of(run, config)
    counted = Traffic(all_reduce=4 if shards > 1 and number == 0 else 0)
    shapes = _parameters(chunk.stage, config)
    if parallel.zero_stage == 1:
        sums = step_end_traffic(
            chunk.stage,
            model=model,
            tp=tp,
            parameters=sum(bucket.end - bucket.start for bucket in _buckets(run, config, number)),
            distributed_optimizer=True,
            itemsize=itemsize,
            grad_itemsize=GRAD_ITEMSIZE,
        )
        over_tp = Traffic(all_reduce=sums.all_reduce - 4)
        if shards == 1:
            return {"tp": over_tp, "dp_cp": counted}
        return {"tp": over_tp, "dp_cp": Traffic(all_gather=sums.all_gather, reduce_scatter=sums.reduce_scatter) + counted}
    blocks, rest = (sum(-(-shape.rows // shards) * shards * shape.width for shape in part) for part in shapes)
    sums = fully_sharded_traffic(
        zero_stage=parallel.zero_stage,
        blocks=blocks,
        rest=rest,
        shards=shards,
        microbatches=len(run.microbatches),
        itemsize=itemsize,
        grad_itemsize=GRAD_ITEMSIZE,
    )
    rank = run.at.dp * parallel.context_parallel_size + run.at.cp
    held = sum(shape.held(rank, shards) for part in shapes for shape in part if shape.sequence_parallel)
    over_tp = Traffic(all_reduce=GRAD_ITEMSIZE * held if tp > 1 else 0)
    return {"tp": over_tp, "dp_cp": Traffic(all_gather=sums.all_gather, reduce_scatter=sums.reduce_scatter) + counted}


def shards_of(run: RankStep, config: RunConfig) -> int:
    """Ranks that hold the same part of the model: DP x CP."""
    return run.world_size // (config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size)


def _parameters(stage: StageShape, config: RunConfig) -> tuple[list[ParameterShape], list[ParameterShape]]:
    """Parameters of a chunk on one TP rank: of its blocks, and the others."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    double, single, first, last = (parameter_shapes(model, part, tp=tp) for part in ("double", "single", "first", "last"))
    rest = (first if stage.pre_process else []) + (last if stage.post_process else [])
    return double * stage.num_double + single * stage.num_single, rest

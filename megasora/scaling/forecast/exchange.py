"""What data-parallel exchanges take beyond the passes they run beside: gradients out, weights back.

Bytes are those of `perf.collectives`. With ZeRO-1 gradients are reduce-scattered during the last micro-batch's backward pass and weights
gathered during the next step's first forward pass; with ZeRO-2 and 3 after every micro-batch, and weights block by block.
"""

from __future__ import annotations

from dataclasses import dataclass

from megasora.config.memory import block_modes, number_bytes
from megasora.config.parameters import double_block_parameters, single_block_parameters
from megasora.config.pipeline_split import stage_parameters
from megasora.config.schema import RunConfig
from megasora.parallel.topology import Topology
from megasora.perf.collectives import StageShape, sequence_parallel_gradients
from megasora.perf.hardware import Hardware
from megasora.perf.network import Kind, Placement, collective_s, placement_of

HIDDEN = 0.9
"""Share of a pass that an exchange can run beside: the first bucket has nothing to run beside yet."""
BUCKET = 40_000_000
"""Gradients of a bucket: Megatron's DistributedDataParallelConfig, bucket_size = max(40 M, 1 M x DP)."""
AGREEMENTS = 3
"""All-reduces of a few numbers over the world: losses, costs of the clips, gradient norm."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Seconds of a stage's passes, all its chunks together, micro-batch after micro-batch."""

    forwards: tuple[float, ...]
    backwards: tuple[float, ...]


def shard_group(topology: Topology, hardware: Hardware) -> Placement:
    """Where the ranks stand that share out a stage's optimizer: CP x DP neighbours, TP apart."""
    return placement_of(size=topology.cp * topology.dp, stride=topology.tp, domain=hardware.node.ranks)


def overlaps(config: RunConfig, topology: Topology, hardware: Hardware) -> tuple[bool, bool]:
    """(gradients, weights): whether their exchanges run beside passes, by the settings' own defaults."""
    parallel = config.parallel
    default = hardware.device == "cuda" and topology.dp * topology.cp > 1
    gradients = default if parallel.overlap_grad_reduce is None else parallel.overlap_grad_reduce
    return gradients, gradients if parallel.overlap_param_gather is None else parallel.overlap_param_gather


def data_parallel_s(config: RunConfig, stage: int, beside: Beside, *, topology: Topology, hardware: Hardware) -> float:
    """Seconds of a step that a stage's ranks wait for gradients, weights and each other's numbers."""
    world = placement_of(size=topology.cp * topology.dp * topology.tp * topology.pp, stride=1, domain=hardware.node.ranks)
    agreed = AGREEMENTS * collective_s("all_reduce", 64, placement=world, hardware=hardware)
    return (
        agreed
        + _tensor_parallel_gradients_s(config, stage, topology=topology, hardware=hardware)
        + (
            _zero1_s(config, stage, beside, topology=topology, hardware=hardware)
            if config.parallel.zero_stage == 1
            else _fully_sharded_s(config, stage, beside, topology=topology, hardware=hardware)
        )
    )


def _tensor_parallel_gradients_s(config: RunConfig, stage: int, *, topology: Topology, hardware: Hardware) -> float:
    """Gradients of what acts on token shares, summed over TP once a step in fp32."""
    if topology.tp == 1:
        return 0.0
    shape = _shape(config, stage, topology)
    group = placement_of(size=topology.tp, stride=1, domain=hardware.node.ranks)
    return collective_s("all_reduce", 4 * sequence_parallel_gradients(shape, model=config.model), placement=group, hardware=hardware)


def _shape(config: RunConfig, stage: int, topology: Topology) -> StageShape:
    blocks = [
        double
        for chunk in range(config.parallel.num_model_chunks)
        for double, _ in block_modes(config.model, config.parallel, stage=stage, chunk=chunk)
    ]
    return StageShape(
        num_double=sum(blocks), num_single=len(blocks) - sum(blocks), pre_process=stage == 0, post_process=stage == topology.pp - 1
    )


def _zero1_s(config: RunConfig, stage: int, beside: Beside, *, topology: Topology, hardware: Hardware) -> float:
    group = shard_group(topology, hardware)
    own = stage_parameters(config.model, config.parallel)[stage] / topology.tp
    buckets = max(1, round(own / max(BUCKET, 1_000_000 * group.size)))
    gradients = buckets * collective_s("reduce_scatter", 4 * own / buckets, placement=group, hardware=hardware)
    weights = buckets * collective_s("all_gather", number_bytes(config) * own / buckets, placement=group, hardware=hardware)
    hides_gradients, hides_weights = overlaps(config, topology, hardware)
    exposed = _exposed(gradients, beside.backwards[-1] if hides_gradients else 0.0, buckets)
    return exposed + _exposed(weights, beside.forwards[0] if hides_weights else 0.0, buckets)


def _exposed(seconds: float, passing: float, pieces: int) -> float:
    """What of an exchange in pieces sticks out of a pass: at least its last piece, which nothing follows."""
    return seconds if not passing else max(seconds / pieces, seconds - HIDDEN * passing)


def _fully_sharded_s(config: RunConfig, stage: int, beside: Beside, *, topology: Topology, hardware: Hardware) -> float:
    """ZeRO-2 and 3 (torch's FSDP2), whose exchanges run beside passes on a GPU."""
    group = shard_group(topology, hardware)
    if group.size == 1:
        return 0.0
    shape, model = _shape(config, stage, topology), config.model
    own = stage_parameters(model, config.parallel)[stage] / topology.tp
    in_blocks = (shape.num_double * double_block_parameters(model) + shape.num_single * single_block_parameters(model)) / topology.tp
    pieces = shape.num_double + shape.num_single + 1
    on_gpu = hardware.device == "cuda"

    def exchange(kind: Kind, elements: float, size: int) -> float:
        return pieces * collective_s(kind, size * elements / pieces, placement=group, hardware=hardware)

    scattered, gathered, again = exchange("reduce_scatter", own, 4), exchange("all_gather", own, number_bytes(config)), 0.0
    if config.parallel.zero_stage == 3:
        again = exchange("all_gather", in_blocks, number_bytes(config))
    exposed = 0.0
    for number, (forward, backward) in enumerate(zip(beside.forwards, beside.backwards, strict=True)):
        if number == 0 or config.parallel.zero_stage == 3:
            exposed += _exposed(gathered, forward if on_gpu else 0.0, pieces)
        exposed += _exposed(scattered + again, backward if on_gpu else 0.0, pieces)
    return exposed

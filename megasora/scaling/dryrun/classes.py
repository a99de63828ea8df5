"""Which ranks of a job do the same, so that one of each shows the whole job.

Two ranks are alike when they hold the same stage and their replicas' packs have the same shapes. TP ranks then differ in which heads and
tokens they hold, never in how many; so do context ranks, but for ring attention, where a clip whose tokens do not divide by the ring gives
one member more of them than another. What still differs is the shard of the optimizer's state: the first ranks of DP x CP hold the most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from megasora.config.memory import ulysses_size
from megasora.config.pack_tokens import FP8_ROW_MULTIPLE
from megasora.config.schema import RunConfig
from megasora.data.plan import sample_cost
from megasora.parallel.pack import PackSplit, SampleShape
from megasora.parallel.topology import Coordinates, Topology, topology_of
from megasora.scaling.dryrun.run import refuse
from megasora.scaling.workload import Clips, StepPacks, planned_clips, shapes_of_pack, steps_of

MOST_REPLICAS = 6
"""Replicas with different packs that are run; a job of hundreds of mixed replicas would take an hour."""
ReplicaShapes = tuple[tuple[SampleShape, ...], ...]


@dataclass(frozen=True, kw_only=True)
class RankClass:
    """Ranks of which one is run."""

    rank: int
    """The one: the first."""
    ranks: tuple[int, ...]
    """All of them."""
    stage: int
    ring_rank: int | None
    """Where members of a ring differ; None where they do not."""
    samples: int
    tokens: int
    """Of the replica's packs, without padding."""
    match: Literal["same", "at most"]
    """same: every rank does exactly this; at most: replicas with other packs are counted to the next busier one that is run."""
    why: str
    """Why they are alike, in a sentence."""


def rank_classes(config: RunConfig, world_size: int, *, clips: Clips = "auto") -> list[RankClass]:
    """Classes that cover every rank of a job once, busiest replica first, then by stage.

    Raises:
        UserError: see `run.dry_run`.
    """
    refuse(config, world_size=world_size)
    step = steps_of(config, planned_clips(config, clips=clips), world_size=world_size)[0]
    return classes_of_step(config, step, world_size=world_size)


def classes_of_step(config: RunConfig, step: StepPacks, *, world_size: int) -> list[RankClass]:
    """`rank_classes` of a step that is known."""
    topology = topology_of(config.parallel, world_size=world_size)
    groups = _alike_replicas(step, hidden_size=config.model.hidden_size)
    chosen = _chosen(list(groups))
    found = []
    for shapes, (covered, exact) in chosen.items():
        replicas = [replica for other in covered for replica in groups[other]]
        for stage in range(topology.pp):
            for ring_ranks in _alike_ring_ranks(config, topology, shapes):
                ranks = _ranks(topology, replicas, stage, _context_ranks(config, topology, ring_ranks))
                found.append(
                    RankClass(
                        rank=_first(topology, groups[shapes][0], stage, _context_ranks(config, topology, ring_ranks)),
                        ranks=ranks,
                        stage=stage,
                        ring_rank=None if len(ring_ranks) == topology.cp // ulysses_size(config) else ring_ranks[0],
                        samples=sum(len(pack) for pack in shapes),
                        tokens=sum(shape.tokens for pack in shapes for shape in pack),
                        match="same" if exact else "at most",
                        why=_why(
                            topology, replicas=len(replicas), exact=exact, apart=len(ring_ranks) < topology.cp // ulysses_size(config)
                        ),
                    )
                )
    return found


def _alike_replicas(step: StepPacks, *, hidden_size: int) -> dict[ReplicaShapes, list[int]]:
    """Replicas by the shapes of their packs, the busiest first."""
    groups: dict[ReplicaShapes, list[int]] = {}
    for replica in range(len(step.replicas)):
        groups.setdefault(tuple(shapes_of_pack(pack) for pack in step.computed(replica)), []).append(replica)

    def work(shapes: ReplicaShapes) -> float:
        return sum(sample_cost(shape.tokens, hidden_size=hidden_size) for pack in shapes for shape in pack)

    return dict(sorted(groups.items(), key=lambda group: -work(group[0])))


def _chosen(shapes: Sequence[ReplicaShapes]) -> dict[ReplicaShapes, tuple[list[ReplicaShapes], bool]]:
    """Replicas that are run, with those that each stands for and whether these are exactly alike."""
    if len(shapes) <= MOST_REPLICAS:
        return {one: ([one], True) for one in shapes}
    places = sorted({number * (len(shapes) - 1) // (MOST_REPLICAS - 1) for number in range(MOST_REPLICAS)})
    ends = [*places[1:], len(shapes)]
    return {shapes[first]: (list(shapes[first:end]), end - first == 1) for first, end in zip(places, ends, strict=True)}


def _alike_ring_ranks(config: RunConfig, topology: Topology, shapes: ReplicaShapes) -> list[list[int]]:
    """Ring members that hold as many tokens of every sample."""
    rings = topology.cp // ulysses_size(config)
    if rings == 1:
        return [[0]]
    split = PackSplit(tp=topology.tp, cp=topology.cp, row_multiple=FP8_ROW_MULTIPLE[config.precision.fp8])
    alike: dict[tuple[int, ...], list[int]] = {}
    for ring_rank in range(rings):
        members = _context_ranks(config, topology, [ring_rank])
        held = tuple(count for pack in shapes for count in _held(pack, split, members))
        alike.setdefault(held, []).append(ring_rank)
    return list(alike.values())


def _held(pack: Sequence[SampleShape], split: PackSplit, members: Iterable[int]) -> list[int]:
    """Tokens of each sample, text and video, that some context ranks hold: token j of a stream is rank j mod CP's."""
    counts = []
    for lengths in ([shape.text_tokens for shape in pack], [shape.video_tokens for shape in pack]):
        start = 0
        for length in lengths:
            counts.append(sum(len(range(start + (cp - start) % split.cp, start + length, split.cp)) for cp in members))
            start += length
    return counts


def _context_ranks(config: RunConfig, topology: Topology, ring_ranks: Iterable[int]) -> list[int]:
    size = ulysses_size(config)
    return [cp for ring_rank in ring_ranks for cp in range(ring_rank * size, (ring_rank + 1) * size)]


def _ranks(topology: Topology, replicas: Sequence[int], stage: int, context_ranks: Sequence[int]) -> tuple[int, ...]:
    places = (Coordinates(tp=tp, cp=cp, dp=dp, pp=stage) for dp in replicas for cp in context_ranks for tp in range(topology.tp))
    return tuple(sorted(topology.rank(place) for place in places))


def _first(topology: Topology, replica: int, stage: int, context_ranks: Sequence[int]) -> int:
    return topology.rank(Coordinates(tp=0, cp=context_ranks[0], dp=replica, pp=stage))


def _why(topology: Topology, *, replicas: int, exact: bool, apart: bool) -> str:
    parts = ["the same blocks"]
    if exact:
        parts.append("packs of the same shapes" if replicas > 1 or topology.cp * topology.tp > 1 else "its own packs")
    else:
        parts.append(f"packs of {replicas} replicas, of which the busiest is run")
    if topology.tp > 1:
        parts.append("TP ranks share every product evenly")
    if topology.cp > 1:
        parts.append("this ring member's tokens of each sample" if apart else "context ranks hold equal shares of every sample")
    return "; ".join(parts)

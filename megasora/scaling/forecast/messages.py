"""Bytes that a rank sends and gathers in a step, by group: the closed forms that a dry run is held against (`dryrun.expected`)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megasora.config.schema import RunConfig
from megasora.parallel.topology import Coordinates, topology_of
from megasora.perf.flops import PackOnRank
from megasora.scaling.dryrun.expected import expected_messages
from megasora.scaling.forecast.step import work_of
from megasora.scaling.workload import StepPacks

GROUPS = {"tp": "tp", "ulysses": "cp", "ring": "cp", "pp": "pp", "dp_cp": "dp", "world": "world"}
"""Groups of the collectives, by the axis they belong to."""


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A rank's place and packs."""

    world_size: int
    at: Coordinates
    zero_stage: int
    microbatches: tuple[PackOnRank, ...]


def message_bytes(config: RunConfig, packs: StepPacks, *, world_size: int, stage: int = 0, replica: int = 0) -> dict[str, int]:
    """Payload bytes of the first rank of a stage and replica, by axis: tp, cp, pp, dp, world."""
    topology = topology_of(config.parallel, world_size=world_size)
    found: Counter[str] = Counter()
    microbatches = []
    for pack in packs.computed(replica):
        work = work_of(config, pack)
        video = work.share - work.text_share
        tokens = work.share * topology.tp
        microbatches.append(PackOnRank(samples=work.samples, num_text=work.text_share, num_video=video, tokens=tokens, pairs=0))
    run = _Step(
        world_size=world_size,
        at=Coordinates(tp=0, cp=0, dp=replica, pp=stage),
        zero_stage=config.parallel.zero_stage,
        microbatches=tuple(microbatches),
    )
    for (group, _), size in expected_messages(run, config).items():
        found[GROUPS[group]] += size
    return dict(found)

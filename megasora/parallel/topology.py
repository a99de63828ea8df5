"""Arithmetic of a layout: which coordinates a rank has and which blocks a pipeline stage owns. No torch, no process group.

Rank order is Megatron's `tp-cp-ep-dp-pp` (tp fastest, pp slowest), so that the ranks of one tensor group are neighbours on a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megasora.config.errors import UserError
from megasora.config.schema import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Place of one rank on the four parallel axes."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Sizes of the parallel axes of a whole job."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    vp: int | None = None

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def num_chunks(self) -> int:
        """Model chunks in pipeline order: PP x VP."""
        return self.pp * (self.vp or 1)

    def coordinates(self, rank: int) -> Coordinates:
        """Place of `rank`.

        Raises:
            ValueError: the rank is outside the world.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a world of {self.world_size}")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Coordinates(tp=tp, cp=cp, dp=dp, pp=pp)

    def rank(self, at: Coordinates) -> int:
        """Inverse of `coordinates`."""
        return at.tp + self.tp * (at.cp + self.cp * (at.dp + self.dp * at.pp))

    def replica_ranks(self, dp: int) -> list[int]:
        """Ranks that hold replica `dp` of the model (all of its TP x CP x PP ranks), ascending."""
        return [rank for rank in range(self.world_size) if self.coordinates(rank).dp == dp]


def topology_of(parallel: ParallelConfig, *, world_size: int) -> Topology:
    """Topology of a job of `world_size` ranks.

    Raises:
        UserError: the world does not divide by TP x PP x CP.
    """
    replica = parallel.model_parallel_size
    if world_size % replica:
        raise UserError(
            f"world size ({world_size}) must be a multiple of TP x PP x CP = {replica}; "
            f"start {replica} or {2 * replica} ranks, or change --parallel.*"
        )
    return Topology(
        tp=parallel.tensor_model_parallel_size,
        cp=parallel.context_parallel_size,
        dp=world_size // replica,
        pp=parallel.pipeline_model_parallel_size,
        vp=parallel.virtual_pipeline_model_parallel_size,
    )


def split_by_cost(costs: Sequence[float], num_chunks: int) -> tuple[int, ...]:
    """Lengths of `num_chunks` runs of `costs` whose largest sum is smallest; every run has at least one block.

    Linear partition by dynamic programming; ties give the earlier chunk fewer blocks. O(chunks x blocks^2), exact.

    Raises:
        UserError: fewer blocks than chunks.
    """
    n = len(costs)
    if num_chunks > n:
        raise UserError(f"{n} blocks cannot fill {num_chunks} pipeline chunks (PP x VP); use at most {n}")
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    best = [[float("inf")] * (n + 1) for _ in range(num_chunks + 1)]
    cut = [[0] * (n + 1) for _ in range(num_chunks + 1)]
    best[0][0] = 0.0
    for k in range(1, num_chunks + 1):
        for end in range(k, n + 1):
            for start in range(k - 1, end):
                worst = max(best[k - 1][start], prefix[end] - prefix[start])
                if worst < best[k][end] * (1 - 1e-12):
                    best[k][end], cut[k][end] = worst, start
    lengths: list[int] = []
    end = n
    for k in range(num_chunks, 0, -1):
        start = cut[k][end]
        lengths.append(end - start)
        end = start
    return tuple(reversed(lengths))


def chunk_blocks(lengths: Sequence[int], *, pp_rank: int, pp_size: int, vp_stage: int) -> range:
    """Indices (into the list of double then single blocks) owned by chunk `vp_stage` of stage `pp_rank`.

    Interleaving: chunk v of stage p is number v x PP + p in pipeline order.
    """
    order = vp_stage * pp_size + pp_rank
    start = sum(lengths[:order])
    return range(start, start + lengths[order])

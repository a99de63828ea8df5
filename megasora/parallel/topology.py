"""Arithmetic of a layout: which coordinates a rank has. No torch, no process group.

Rank order is Megatron's `tp-cp-ep-dp-pp` (tp fastest, pp slowest), so that the ranks of one tensor group are neighbours on a node.
"""

from __future__ import annotations

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

"""Process groups: the one file that touches `megatron.core.parallel_state`.

`initialize` builds every group once and returns a `ParallelContext` that is passed to whoever needs it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import HashStore  # type: ignore[attr-defined]

from megasora.config.context_split import ulysses_factor
from megasora.config.errors import UserError
from megasora.config.schema import ParallelConfig
from megasora.parallel.cpu import enable_cpu_backend
from megasora.parallel.meeting import store_of_this_start
from megasora.parallel.topology import Coordinates, Topology, topology_of


@dataclass(frozen=True, kw_only=True)
class ContextGroups:
    """How one context-parallel group is factored: `ulysses` ranks are neighbours, `ring` strides over them."""

    ulysses: dist.ProcessGroup
    ring: dist.ProcessGroup
    ulysses_size: int
    ring_size: int
    ulysses_rank: int
    ring_rank: int

    @property
    def members(self) -> list[range]:
        """Context ranks of each ring member: their tokens are attended together."""
        return [range(number * self.ulysses_size, (number + 1) * self.ulysses_size) for number in range(self.ring_size)]


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """A rank's place and groups in a job."""

    topology: Topology
    at: Coordinates
    rank: int
    device: torch.device
    pg_collection: ProcessGroupCollection
    """Megatron-core's groups (tp, pp, cp, dp, dp_cp, mp, embd, ...)."""
    replica: dist.ProcessGroup
    """All ranks of this rank's model replica (TP x CP x PP): they share decoding and encoding."""
    context: ContextGroups

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.topology.world_size


def choose_device(name: str) -> torch.device:
    """Device of this rank for `auto`, `cpu` or `cuda` (one GPU per local rank).

    Raises:
        UserError: cuda was asked for and there is none, or fewer than local ranks.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu or install a CUDA build of torch")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, visible = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))), torch.cuda.device_count()
    if visible == 1:  # a scheduler that binds GPUs shows each task its own, as number 0
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise UserError(f"local rank {local_rank} has no GPU: {visible} are visible; start at most {visible} ranks on a node")
    return torch.device("cuda", local_rank)


def start_world(device: torch.device, *, timeout_minutes: float) -> None:
    """Start torch.distributed for the world torchrun or srun describes; a bare command is a world of one."""
    if device.type == "cpu":
        enable_cpu_backend()
    else:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    env = os.environ
    rank = int(env.get("RANK", env.get("SLURM_PROCID", "0")))
    world_size = int(env.get("WORLD_SIZE", env.get("SLURM_NTASKS", "1")))
    backend = "gloo" if device.type == "cpu" else "nccl"
    timeout = timedelta(minutes=timeout_minutes)
    if world_size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        raise UserError(f"{world_size} ranks need MASTER_ADDR and MASTER_PORT: start with torchrun, or export both in the sbatch file")
    store = store_of_this_start(rank=rank, world_size=world_size, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def initialize(
    parallel: ParallelConfig, *, device: torch.device, num_attention_heads: int, seed: int, ranks_in_world: int | None = None
) -> ParallelContext:
    """Build every process group of the layout; all ranks of the world call it together.

    Args:
        parallel: sizes of the axes.
        device: this rank's device.
        num_attention_heads: heads of the model, for the Ulysses factor.
        seed: seed of Megatron's RNG tracker (nothing of ours draws from it).
        ranks_in_world: world size; None reads it from torch.distributed.

    Raises:
        UserError: the world or the context factor does not fit.
    """
    world_size = ranks_in_world or dist.get_world_size()
    topology = topology_of(parallel, world_size=world_size)
    factor = ulysses_factor(
        backend=parallel.context_parallel_backend,
        ulysses_size=parallel.ulysses_size,
        context_parallel_size=topology.cp,
        heads_per_tp_rank=num_attention_heads // topology.tp,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        virtual_pipeline_model_parallel_size=topology.vp,
        context_parallel_size=topology.cp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=parallel.timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    rank = dist.get_rank()
    timeout = timedelta(minutes=parallel.timeout_minutes)
    return ParallelContext(
        topology=topology,
        at=topology.coordinates(rank),
        rank=rank,
        device=device,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        replica=_new_group_of(rank, [topology.replica_ranks(dp) for dp in range(topology.dp)], timeout=timeout, name="REPLICA"),
        context=_context_groups(topology, rank, factor, timeout=timeout),
    )


@dataclass(frozen=True, kw_only=True)
class SamplingGroups:
    """Replicas of the model that work on one clip together."""

    branches: dist.ProcessGroup | None
    """The ranks with this rank's share of the tokens, one of each replica; None when a clip has one replica."""
    clip: dist.ProcessGroup
    """All ranks of the clip."""
    number: int
    """Which of the clips that are drawn at the same time is this rank's."""
    count: int
    """Clips that are drawn at the same time."""


def sampling_groups(context: ParallelContext, *, replicas: int, timeout_minutes: float) -> SamplingGroups:
    """Groups of `replicas` neighbouring replicas each, which share out the branches of guidance; all ranks of the world call it together.

    Raises:
        UserError: the world's replicas do not divide by `replicas`.
    """
    topology, timeout = context.topology, timedelta(minutes=timeout_minutes)
    if topology.dp % replicas:
        wanted = replicas * (topology.world_size // topology.dp)
        raise UserError(
            f"--sample.guidance_parallel {replicas} needs a multiple of {wanted} ranks (TP x PP x CP x {replicas}), but "
            f"{topology.world_size} were started; start {wanted}, or use --sample.guidance_parallel 1"
        )
    if replicas == 1:
        return SamplingGroups(branches=None, clip=context.replica, number=context.at.dp, count=topology.dp)
    clips = [[topology.replica_ranks(first + k) for k in range(replicas)] for first in range(0, topology.dp, replicas)]
    return SamplingGroups(
        branches=_new_group_of(context.rank, [list(ranks) for clip in clips for ranks in zip(*clip, strict=True)], timeout=timeout),
        clip=_new_group_of(context.rank, [sorted(rank for replica in clip for rank in replica) for clip in clips], timeout=timeout),
        number=context.at.dp // replicas,
        count=len(clips),
    )


def initialized() -> bool:
    """Whether this process has Megatron's groups."""
    return bool(parallel_state.model_parallel_is_initialized())


def destroy() -> None:
    """Forget Megatron's groups, so that another layout can be built in this process."""
    parallel_state.destroy_model_parallel()


def _new_group_of(rank: int, partition: list[list[int]], *, timeout: timedelta, name: str | None = None) -> dist.ProcessGroup:
    """The group of `partition` that holds `rank`; every rank creates every group, in the same order.

    A group does not inherit the world's timeout: without its own it has the backend's (NCCL: 10 minutes). Traces show its name.
    """
    mine: dist.ProcessGroup | None = None
    for ranks in partition:
        group = dist.new_group(ranks, timeout=timeout, group_desc=name)
        if rank in ranks:
            mine = group
    assert mine is not None, f"rank {rank} is in no group of {partition}"
    return mine


def _context_groups(topology: Topology, rank: int, factor: int, *, timeout: timedelta) -> ContextGroups:
    ulysses: list[list[int]] = []
    ring: list[list[int]] = []
    rings = topology.cp // factor
    for pp in range(topology.pp):
        for dp in range(topology.dp):
            for tp in range(topology.tp):
                ranks = [topology.rank(Coordinates(tp=tp, cp=cp, dp=dp, pp=pp)) for cp in range(topology.cp)]
                ulysses += [ranks[r * factor : (r + 1) * factor] for r in range(rings)]
                ring += [ranks[u::factor] for u in range(factor)]
    cp = topology.coordinates(rank).cp
    return ContextGroups(
        ulysses=_new_group_of(rank, ulysses, timeout=timeout, name="CONTEXT_ULYSSES"),
        ring=_new_group_of(rank, ring, timeout=timeout, name="CONTEXT_RING"),
        ulysses_size=factor,
        ring_size=rings,
        ulysses_rank=cp % factor,
        ring_rank=cp // factor,
    )

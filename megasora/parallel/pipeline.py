"""Pipeline messages whose shapes are never sent: the plan of the step knows them.

Megatron-core 0.16.1 exchanges shapes before every message when lengths vary, which costs a synchronisation per message and deadlocks with
interleaving. Every rank here knows every pack's shape, so `PackP2PCommunicator` answers from the schedule instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table


class PackP2PCommunicator(P2PCommunicator):  # type: ignore[misc]
    """P2P communicator of one step.

    Args:
        pp_group: the pipeline group.
        config: Megatron's settings; variable_seq_lengths must be on.
        shapes: shape of the tensor between stages for each micro-batch of the step, in order.
    """

    def __init__(self, pp_group: dist.ProcessGroup, config: ModelParallelConfig, *, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__(pp_group, config)
        chunks = config.virtual_pipeline_model_parallel_size or 1
        group_size = config.microbatch_group_size_per_vp_stage or pp_group.size()
        table = get_schedule_table(len(shapes), chunks, group_size)
        every = [shapes[microbatch] for microbatch, _ in table]
        without_edge = [shapes[microbatch] for microbatch, chunk in table if chunk < chunks - 1]
        rank, last = pp_group.rank(), pp_group.size() - 1
        self._forward = iter(without_edge if rank == 0 else every)
        self._backward = iter(without_edge if rank == last else every)

    def _communicate_shapes(
        self, tensor_send_next: torch.Tensor | None, tensor_send_prev: torch.Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Shapes of the tensors about to arrive from the previous and the next stage."""
        return (next(self._forward) if recv_prev else None, next(self._backward) if recv_next else None)


def valid_microbatch_group(num_microbatches: int, pp_size: int) -> int:
    """Smallest microbatch_group_size_per_vp_stage >= PP that Megatron's interleaved schedule accepts for this many micro-batches.

    The schedule cuts the micro-batches into groups of N and refuses a last group shorter than PP.
    """
    for size in range(pp_size, num_microbatches + 1):
        rest = num_microbatches % size
        if rest == 0 or rest >= pp_size:
            return size
    raise ValueError(f"{num_microbatches} micro-batches cannot fill {pp_size} interleaved stages; use at least {pp_size}")

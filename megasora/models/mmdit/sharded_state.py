"""A stage's parameters as rectangles of canonical tensors, for Megatron's dist_checkpointing. Keys are `model.<release key>`."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.tensor import DTensor

from megasora.config.schema import ModelConfig
from megasora.models.mmdit.canonical import held_parameters
from megasora.models.mmdit.model import MMDiT
from megasora.parallel.groups import ParallelContext


def sharded(name: str, data: Tensor, global_shape: tuple[int, ...], offset: tuple[int, ...], replica: tuple[int, ...]) -> ShardedTensor:
    """A rectangle of a canonical tensor; the copy with replica (0, 0, 0) is the one written."""
    return ShardedTensor(name, data, data.dtype, tuple(data.shape), global_shape, offset, None, replica_id=replica)


def model_tensors(chunks: Sequence[MMDiT], *, model: ModelConfig, context: ParallelContext) -> dict[str, ShardedTensor]:
    """The parameters in the model's number format: themselves, or (ZeRO-2 and 3 in bf16) a rounded copy of this rank's fp32 rows."""
    at, tp = context.at, context.topology.tp
    copy = context.pg_collection.dp_cp.rank()
    tensors: dict[str, ShardedTensor] = {}
    for chunk in chunks:
        for parameter, held, pieces in held_parameters(chunk, model=model, tp_rank=at.tp, tp_size=tp):
            data = held.to(chunk.config.params_dtype)
            for piece in pieces:
                view = piece.view(data)
                replica = (0, tensor_replica(parameter, at.tp), 0 if isinstance(parameter, DTensor) else copy)
                name = f"model.{piece.key}"
                tensors[f"{name}@{piece.global_offset}"] = sharded(name, view, piece.global_shape, piece.global_offset, replica)
    return tensors


def tensor_replica(parameter: Tensor, tp_rank: int) -> int:
    """Which copy over TP this is: 0 for shards, the rank for replicated parameters."""
    return 0 if getattr(parameter, "tensor_model_parallel", False) else tp_rank

"""What a checkpoint holds beside the weights (models/mmdit/sharded_state): master weights, Adam moments and EMA, in any layout.

Keys are `<part>.<release key>` with part in master, exp_avg, exp_avg_sq, ema. A rank saves its flat optimizer runs as rectangles of
the unsharded tensors, so a checkpoint knows nothing of the layout that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megasora.config.schema import ModelConfig
from megasora.models.mmdit.canonical import canonical_parameters
from megasora.models.mmdit.model import MMDiT
from megasora.models.mmdit.sharded_state import sharded, tensor_replica
from megasora.parallel.groups import ParallelContext
from megasora.parallel.shards import rectangles
from megasora.training.owned_shard import OwnedShard


def optimizer_tensors(
    chunks: Sequence[MMDiT],
    shards: Sequence[OwnedShard],
    *,
    moments: Sequence[Mapping[str, Tensor]],
    averages: Sequence[Tensor],
    model: ModelConfig,
    context: ParallelContext,
) -> dict[str, ShardedTensor]:
    """Master weights (when they are not the parameters), Adam moments and EMA of this rank's flat runs.

    Args:
        chunks: this rank's.
        shards: its runs.
        moments: of each, fp32 (`moments.moments_of`).
        averages: of each; empty without an EMA.
        model, context: sizes and groups.
    """
    at, tp = context.at, context.topology.tp
    pieces_by_parameter = {
        parameter: pieces
        for chunk in chunks
        for _, parameter, pieces in canonical_parameters(chunk, model=model, tp_rank=at.tp, tp_size=tp)
    }
    tensors: dict[str, ShardedTensor] = {}
    for number, shard in enumerate(shards):
        buffers = dict(moments[number])
        if shard.master.dtype != shard.dtype:
            buffers["master"] = shard.master.data
        if averages:
            buffers["ema"] = averages[number]
        pieces = pieces_by_parameter[shard.parameter]
        for box in rectangles(pieces, local_shape=tuple(shard.parameter.shape), start=shard.start, stop=shard.stop):
            replica = (0, tensor_replica(shard.parameter, at.tp), 0)
            for part, flat in buffers.items():
                name = f"{part}.{box.piece.key}"
                tensors[f"{name}@{box.global_offset}"] = sharded(name, box.view(flat), box.piece.global_shape, box.global_offset, replica)
    return tensors

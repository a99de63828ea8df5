"""Runs the micro-batches of one step through Megatron's schedules: no pipeline, 1F1B or interleaved, forward only or with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megasora.models.mmdit.model import ModelInputs
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack
from megasora.parallel.pipeline import PackP2PCommunicator, valid_microbatch_group


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one rank feeds and compares for one pack."""

    pack: Pack
    inputs: ModelInputs | None
    """Token shares for the first stage, None elsewhere."""
    target: Tensor | None
    """[num_video, C] velocity for the last stage, None elsewhere."""
    weight: Tensor | None
    """fp32 [num_video]: sample weight / (sample's tokens x C), 0 for dummy tokens; None but on the last stage."""
    num_counted: int
    """Samples with weight 1."""
    positions: Tensor | None = None
    """[S, 3] token positions when they are not the pack's own."""

    def message_shape(self, hidden_size: int) -> tuple[int, int]:
        """Shape of the tensor between stages: [share + samples, H]."""
        return (self.pack.num_text + self.pack.num_video + self.pack.num_samples, hidden_size)


LossFunction = Callable[[Tensor, MicroBatch], tuple[Tensor, Tensor, Any]]
"""(model output, micro-batch) -> (loss sum to differentiate, int32 number of samples, report)."""


def run_schedule(
    chunks: Sequence[nn.Module],
    batches: Sequence[MicroBatch],
    *,
    config: TransformerConfig,
    context: ParallelContext,
    loss_function: LossFunction,
    forward_only: bool = False,
) -> list[Any]:
    """Forward (and backward) of every micro-batch; gradients are reduced and divided by the number of samples at the end.

    Args:
        chunks: this rank's model chunks (DDP-wrapped for training), in virtual-stage order.
        batches: micro-batches, the same number on every rank.
        config: Megatron's settings; finalize_model_grads_func is set by whoever trains.
        context: this rank's groups.
        loss_function: called on the last stage.
        forward_only: no backward; reports are what loss_function returns last.

    Returns:
        The reports, one per micro-batch on the last stage, empty elsewhere.
    """
    topology = context.topology
    if topology.vp is not None:
        config.microbatch_group_size_per_vp_stage = valid_microbatch_group(len(batches), topology.pp)
    shapes = [batch.message_shape(config.hidden_size) for batch in batches]
    groups = context.pg_collection

    def forward_step(iterator: Iterator[MicroBatch], chunk: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(iterator)
        output: Tensor = chunk(batch.inputs, batch.pack, batch.positions)
        return output, partial(_apply_loss, loss_function, batch)

    run = get_forward_backward_func(topology.pp, topology.vp)
    iterators = [iter(batches) for _ in chunks]
    reports: list[Any] = run(
        forward_step_func=forward_step,
        data_iterator=iterators if topology.vp is not None else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=shapes[0][0],
        micro_batch_size=1,
        forward_only=forward_only,
        p2p_communicator=PackP2PCommunicator(groups.pp, config, shapes=shapes),
        pg_collection=groups,
    )
    return reports


def _apply_loss(loss_function: LossFunction, batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, Any]:
    return loss_function(output, batch)

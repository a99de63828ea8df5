"""A rank's micro-batches of a step: packs of real clips' shapes with their tables, and fake tensors in place of the clips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megasora.config.pack_tokens import FP8_ROW_MULTIPLE
from megasora.config.schema import RunConfig
from megasora.data.plan import SamplerState, StepPlan
from megasora.models.mmdit.model import ModelInputs
from megasora.models.mmdit.schedule import MicroBatch
from megasora.parallel.groups import ParallelContext
from megasora.parallel.pack import Pack, PackSplit, SampleShape
from megasora.scaling.workload import StepPacks, shapes_of_pack
from megasora.training.feed import Balance, StepBatch


def packs_of(config: RunConfig, step: StepPacks, *, context: ParallelContext) -> list[Pack]:
    """This rank's packs with the tables that layers ask for: they are made of numbers, so before the tensors are fake."""
    topology, at = context.topology, context.at
    split = PackSplit(tp=topology.tp, cp=topology.cp, row_multiple=FP8_ROW_MULTIPLE[config.precision.fp8])
    made: dict[tuple[SampleShape, ...], Pack] = {}
    for clips in step.computed(at.dp):
        shapes = shapes_of_pack(clips)
        if shapes not in made:
            made[shapes] = pack = Pack(shapes, split=split, tp_rank=at.tp, cp_rank=at.cp)
            _prepare(pack, context)
    return [made[shapes_of_pack(clips)] for clips in step.computed(at.dp)]


def _prepare(pack: Pack, context: ParallelContext) -> None:
    members = context.context.members
    pack.prepare(members)
    for runs in (pack.text_runs, pack.video_runs, pack.joint_runs):
        assert runs.tile_one_hot.numel(), "a share has tokens"
    pack.head_rows(None if context.context.ulysses_size > 1 else members[context.context.ring_rank])


def tables_of(pack: Pack) -> list[Tensor]:
    """A pack's tensors on the device."""
    runs = (pack.text_runs, pack.video_runs, pack.joint_runs)
    tables = [pack.positions, *(table for run in runs for table in (run.index, run.tiles, run.tile_one_hot))]
    for order in pack._orders.values():
        tables += [table for table in (order.index, order.inverse, order.cu_seqlens) if table is not None]
    for rows in pack._head_rows.values():
        tables += [row.index for row in (rows.text, rows.video, rows.joint) if row.index is not None]
    return tables


def step_batch(config: RunConfig, packs: Sequence[Pack], *, context: ParallelContext, dtype: torch.dtype) -> StepBatch:
    """The step's micro-batches; call it in fake tensor mode."""
    batches = [_micro_batch(config, pack, context=context, dtype=dtype) for pack in packs]
    return StepBatch(
        batches=batches,
        plan=StepPlan(position=SamplerState(), samples=(), state_after=SamplerState()),
        tokens=0,
        flops_tokens=(),
        skipped=(),
        wait_s=0.0,
        frames=0,
        decode_s=0.0,
        encode_s=0.0,
        balance=Balance(pad_share=0.0, imbalance=1.0),
    )


def _micro_batch(config: RunConfig, pack: Pack, *, context: ParallelContext, dtype: torch.dtype) -> MicroBatch:
    model = config.model
    first, last = context.at.pp == 0, context.at.pp == context.topology.pp - 1
    inputs = None
    if first:
        inputs = ModelInputs(
            img=torch.empty(pack.num_video, model.in_channels, dtype=dtype),
            txt=torch.empty(pack.num_text, model.text_dim, dtype=dtype),
            t=torch.empty(pack.num_samples),
            y_vec=torch.empty(pack.num_samples, model.vec_dim, dtype=dtype),
            cond=torch.empty(pack.num_video, model.cond_channels, dtype=dtype) if model.cond_embed else None,
            guidance=torch.empty(pack.num_samples) if model.guidance_embed else None,
        )
    return MicroBatch(
        pack=pack,
        inputs=inputs,
        target=torch.empty(pack.num_video, model.in_channels) if last else None,
        weight=torch.empty(pack.num_video) if last else None,
        num_counted=pack.num_samples,
    )


def tensors_of(batch: MicroBatch) -> list[Tensor]:
    """Inputs, target and weights of a micro-batch."""
    inputs = [] if batch.inputs is None else [getattr(batch.inputs, name) for name in ("img", "txt", "t", "y_vec", "cond", "guidance")]
    return [tensor for tensor in (*inputs, batch.target, batch.weight) if tensor is not None]

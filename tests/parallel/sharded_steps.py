"""One training step of a small MMDiT under ZeRO-2 or ZeRO-3 in any layout; `layouts` has the same on Megatron's DDP."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from megasora.config.schema import OptimizerConfig, PrecisionConfig
from megasora.models.mmdit.build import build_chunks
from megasora.models.mmdit.canonical import held_parameters
from megasora.models.mmdit.schedule import run_schedule
from megasora.parallel import groups
from megasora.parallel.row_shards import reshard
from megasora.training import fully_sharded
from megasora.training.fully_sharded import FullyShardedAdam
from megasora.training.microbatch import velocity_loss
from megasora.training.optimizer import prepare_training, update_weights, zero_gradients
from tests.parallel.layouts import Case, Measured, fill, microbatches


def sharded_step(rank: int, case: Case) -> Measured:
    """Forward, backward and reductions of one step; each rank gives the gradients of its rows."""
    context = groups.initialize(case.parallel, device=torch.device("cpu"), num_attention_heads=case.model.num_attention_heads, seed=1)
    chunks, config = build_chunks(case.model, case.parallel, PrecisionConfig(dtype="fp32"), context=context, dtype=case.dtype)
    fill(list(chunks), context, case.model)
    settings = OptimizerConfig(clip_grad=0.0, lr=0.0)
    with pytest.MonkeyPatch.context() as patch:
        if case.mistake == "marks of parameters lost":
            patch.setattr(fully_sharded, "_MARKS", ())
        wrapped, optimizer = prepare_training(chunks, config=config, parallel=case.parallel, optimizer=settings, context=context)
    if case.mistake == "gradients averaged over replicas":
        for module in wrapped[0].modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(float(context.pg_collection.dp_cp.size()))
    assert isinstance(optimizer, FullyShardedAdam)
    zero_gradients(wrapped, optimizer)
    reports = run_schedule(
        wrapped,
        microbatches(case, context),
        config=config,
        context=context,
        loss_function=lambda output, batch: velocity_loss(output, batch, context_rank=context.at.cp),
    )
    total = torch.stack(reports).sum().double() if reports else torch.zeros((), dtype=torch.float64)
    dist.all_reduce(total)
    reshard(chunks)
    gradients = []
    for chunk in chunks:
        for parameter, _, pieces in held_parameters(chunk, model=case.model, tp_rank=context.at.tp, tp_size=context.topology.tp):
            rows = parameter.grad.to_local()
            gradients += [(piece.key, piece.global_slices, piece.global_shape, piece.view(rows).double().clone()) for piece in pieces]
    norm, _ = update_weights(optimizer, accept=lambda norm: True)
    return Measured(loss=float(total) / (len(case.samples) - len(case.zero_weight)), grad_norm=norm, gradients=gradients)

"""What a replica that is alone leaves out, and that nothing else does: reductions over a group of one rank, passes of Adam."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megasora.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig
from megasora.models.mmdit.build import build_chunks
from megasora.models.mmdit.schedule import run_schedule
from megasora.parallel import groups
from megasora.training.microbatch import velocity_loss
from megasora.training.optimizer import build_optimizer, ensure_adam_state, refresh_masters, wrap_for_training
from tests.parallel.layouts import MODEL, Case, fill, microbatches
from tests.parallel.test_parity import layout
from tests.pool import RankPool

ADAM = OptimizerConfig(lr=1e-2, eps=1e-3)
"""Its epsilon is far above rounding: a first step otherwise divides every gradient by itself, also one that is only rounding."""


def step_on_rank(rank: int, parallel: ParallelConfig, dtype: str, traced: bool = True) -> dict[str, Any]:
    """One optimizer step: the large collectives it ran (where it is traced), the Adam it took and the weights afterwards."""
    context = groups.initialize(parallel, device=torch.device("cpu"), num_attention_heads=MODEL.num_attention_heads, seed=1)
    chunks, config = build_chunks(MODEL, parallel, PrecisionConfig(dtype=dtype), context=context)  # type: ignore[arg-type]
    fill(list(chunks), context, MODEL)
    wrapped = wrap_for_training(chunks, config=config, parallel=parallel, context=context)
    optimizer = build_optimizer(wrapped, optimizer=ADAM, dtype=config.params_dtype)
    refresh_masters(optimizer)
    ensure_adam_state(optimizer, step=0)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    with torch.profiler.profile() if traced else nullcontext() as profile:
        run_schedule(
            wrapped,
            microbatches(Case(parallel=parallel, dtype=config.params_dtype), context),
            config=config,
            context=context,
            loss_function=lambda output, batch: velocity_loss(output, batch, context_rank=context.at.cp),
        )
        optimizer.step()
    inner = optimizer.chained_optimizers[0].optimizer if hasattr(optimizer, "chained_optimizers") else optimizer.optimizer
    return {
        "wrapper": {type(chunk).__name__ for chunk in wrapped},
        "large": None
        if profile is None
        else sum(event.name.startswith(("gloo:reduce_scatter", "gloo:all_gather", "gloo:allgather")) for event in profile.events() or []),
        "adam": {(type(inner).__name__, group["fused"], group["foreach"]) for group in inner.param_groups},
        "weights": torch.cat([parameter.detach().double().flatten() for chunk in chunks for parameter in chunk.parameters()]),
        "ranks": dist.get_world_size(),
    }


@pytest.fixture(scope="module")
def alone(pool: RankPool) -> dict[str, Any]:
    """The step of one rank."""
    return pool.run(1, step_on_rank, layout(), "fp32")[0]


def test_a_replica_alone_reduces_nothing_and_a_pair_does(pool: RankPool, alone: dict[str, Any]) -> None:
    pair = pool.run(2, step_on_rank, layout(), "fp32")
    assert (alone["wrapper"], alone["large"]) == ({"LoneReplica"}, 0)
    assert {name for rank in pair for name in rank["wrapper"]} == {"DistributedDataParallel"}
    assert all(rank["large"] > 0 for rank in pair)
    # lr x (rounding of a gradient of about 1, 1e-7) / eps is 1e-6
    torch.testing.assert_close(pair[0]["weights"], alone["weights"], rtol=0, atol=1e-5)
    assert torch.equal(pair[0]["weights"], pair[1]["weights"])


def test_context_ranks_are_no_lone_replica(pool: RankPool) -> None:
    """They hold different tokens: their gradients are summed."""
    for rank in pool.run(2, step_on_rank, layout(cp=2), "fp32", False):
        assert rank["wrapper"] == {"DistributedDataParallel"}


def test_overlap_keeps_megatrons_own_wrapper(pool: RankPool, alone: dict[str, Any]) -> None:
    """It works by hooks on the buckets, which ask nobody's `start_grad_sync`."""
    (plain,) = pool.run(1, step_on_rank, ParallelConfig(overlap_grad_reduce=True), "fp32")
    assert plain["wrapper"] == {"DistributedDataParallel"}
    assert plain["large"] > 0
    assert torch.equal(alone["weights"], plain["weights"])


def test_torchs_adam_is_fused_on_the_cpu(pool: RankPool, alone: dict[str, Any]) -> None:
    for step in (alone, *pool.run(1, step_on_rank, layout(), "bf16", False)):
        assert step["adam"] == {("AdamW", True, False)}

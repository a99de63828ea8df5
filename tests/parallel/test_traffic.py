"""The bytes of every collective of a step equal the written formulas: no hidden gather."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megasora.config.schema import OptimizerConfig, PrecisionConfig
from megasora.models.mmdit.build import build_chunks
from megasora.models.mmdit.schedule import run_schedule
from megasora.parallel import groups
from megasora.perf.collectives import (
    StageShape,
    Traffic,
    fully_sharded_traffic,
    pipeline_traffic,
    ring_traffic,
    sequence_parallel_gradients,
    step_end_traffic,
    tensor_parallel_traffic,
    ulysses_traffic,
)
from megasora.training.microbatch import velocity_loss
from megasora.training.optimizer import prepare_training
from tests.parallel.layouts import Case, fill, microbatches
from tests.parallel.test_parity import layout
from tests.pool import RankPool

KINDS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "send": "send",
}
"""c10d operators and their kind; recv_ is the other end of send, broadcast_ carries one int32 over the pipeline."""


class CountBytes(TorchDispatchMode):
    """Adds up the largest tensor (all of them for a coalesced one) of every c10d call."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            sizes = [x.numel() * x.element_size() for x in tree_iter(args) if isinstance(x, torch.Tensor)]
            self.calls[name] += 1
            self.bytes[name] += sum(sizes) if "coalesced" in name else max(sizes, default=0)
        return func(*args, **(kwargs or {}))


def measure(rank: int, case: Case) -> tuple[dict[str, int], dict[str, int]]:
    """(counted bytes, formula) of one step on this rank."""
    context = groups.initialize(case.parallel, device=torch.device("cpu"), num_attention_heads=case.model.num_attention_heads, seed=1)
    chunks, config = build_chunks(case.model, case.parallel, PrecisionConfig(dtype="fp32"), context=context, dtype=case.dtype)
    fill(chunks, context, case.model)
    shards, zero_stage = context.pg_collection.dp_cp.size(), case.parallel.zero_stage
    sizes_of = [(padded_elements(chunk.double_blocks, shards) + padded_elements(chunk.single_blocks, shards), chunk) for chunk in chunks]
    in_chunks = [(blocks, padded_elements(chunk, shards) - blocks) for blocks, chunk in sizes_of]
    if zero_stage == 1:
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=False)
        wrapped = [DistributedDataParallel(config, ddp_config, chunk, pg_collection=context.pg_collection) for chunk in chunks]
        config.finalize_model_grads_func = finalize_model_grads
    else:
        wrapped, _ = prepare_training(chunks, config=config, parallel=case.parallel, optimizer=OptimizerConfig(), context=context)
    batches = microbatches(case, context)
    with CountBytes() as counter:
        run_schedule(
            wrapped,
            batches,
            config=config,
            context=context,
            loss_function=lambda output, batch: velocity_loss(output, batch, context_rank=context.at.cp),
        )
    known = dict.fromkeys(KINDS.values(), 0)
    for name, kind in KINDS.items():
        known[kind] += counter.bytes.pop(name, 0)
    known["other"] = sum(size for name, size in counter.bytes.items() if name not in ("recv_", "broadcast_"))
    expected = Traffic()
    tp, size = context.topology.tp, 8
    for chunk, (in_blocks, rest) in zip(chunks, in_chunks, strict=True):
        shape = StageShape(
            num_double=len(chunk.double_blocks),
            num_single=len(chunk.single_blocks),
            pre_process=chunk.pre_process,
            post_process=chunk.post_process,
        )
        for batch in batches:
            share = batch.pack.num_text + batch.pack.num_video
            sizes = {"model": case.model, "tp": tp, "tokens": share * tp, "itemsize": size}
            expected += tensor_parallel_traffic(shape, samples=batch.pack.num_samples, **sizes)
            expected += ulysses_traffic(shape, size=context.context.ulysses_size, **sizes)
            # after the all-to-all a rank holds the tokens of its Ulysses group, for as many fewer heads
            expected += ring_traffic(shape, size=context.context.ring_size, grad_itemsize=size, **sizes)
            expected += pipeline_traffic(
                model=case.model,
                share_tokens=share,
                samples=batch.pack.num_samples,
                forward=not shape.post_process,
                backward=not shape.pre_process,
                itemsize=size,
            )
        if zero_stage > 1:
            of_dp = {"blocks": in_blocks, "rest": rest, "shards": shards, "microbatches": len(batches)}
            expected += fully_sharded_traffic(zero_stage=zero_stage, itemsize=size, grad_itemsize=size, **of_dp)
            if tp > 1:
                expected += Traffic(all_reduce=size * sequence_parallel_gradients(shape, model=case.model) // shards)
            continue
        parameters = sum(parameter.numel() for parameter in chunk.parameters())
        expected += step_end_traffic(
            shape, model=case.model, tp=tp, parameters=parameters, distributed_optimizer=False, itemsize=size, grad_itemsize=size
        )
    formula = {name: getattr(expected, name) for name in expected.__dataclass_fields__}
    formula["all_reduce"] -= 4 * (len(chunks) - 1)  # the number of samples is reduced once, not per chunk
    return known, {**formula, "other": 0}


def padded_elements(module: torch.nn.Module, shards: int) -> int:
    """Elements of a module's parameters, their rows padded to a multiple of the shards."""
    rows = [(parameter.shape[0], parameter[0].numel()) for parameter in module.parameters()]
    return sum(-(-count // shards) * shards * width for count, width in rows)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, layout(tp=2)),
        (2, layout(cp=2)),
        (4, layout(cp=4, context_parallel_backend="ring")),
        (4, layout(cp=4, context_parallel_backend="ulysses_ring", ulysses_size=2)),
        (2, layout(pp=2)),
        (2, layout(pp=2, vp=2)),
        (8, layout(tp=2, pp=2, cp=2)),
        (3, layout(zero_stage=2)),
        (3, layout(zero_stage=3)),
        (2, layout(zero_stage=3, recompute="full")),
        (8, layout(zero_stage=3, tp=2, pp=2)),
        (4, layout(zero_stage=3, pp=2, vp=2)),
    ],
    ids=[
        "tp2",
        "cp2 ulysses",
        "cp4 ring",
        "cp4 both",
        "pp2",
        "pp2 vp2",
        "tp2 pp2 cp2",
        "zero2",
        "zero3",
        "zero3 recompute",
        "zero3 tp2 pp2",
        "zero3 pp2 vp2",
    ],
)
def test_a_step_sends_what_the_formula_says(pool: RankPool, world_size: int, parallel: Any) -> None:
    case = Case(parallel=parallel, num_microbatches=2 if world_size == 3 else 4)  # of eight samples
    for rank, (counted, formula) in enumerate(pool.run(world_size, measure, case)):
        assert counted == formula, f"rank {rank}"

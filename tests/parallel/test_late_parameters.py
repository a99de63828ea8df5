"""With overlap_param_gather a weight is the old one, or half of it, until its own module runs forward: nothing may read it before.

On the CPU messages are mostly there in time, so here they come as late as they may: parameters of other ranks are NaN until Megatron waits
for them, in buckets of a module or two.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megasora.config.schema import RunConfig
from megasora.training import optimizer
from tests.parallel.runs import metrics, tiny_run, train_on_rank
from tests.parallel.test_parity import layout
from tests.pool import RankPool

BUCKET = 5_000
"""Parameters; the model's smallest matrix has 64 x 64."""


class Late:
    """A gather that happens when it is waited for."""

    def __init__(self, group: Any, gather: Any) -> None:
        self.group, self.gather = group, gather

    def wait(self) -> None:
        self.group.param_gather_handle = None
        self.gather(self.group, force_sync=True)


def spoil(group: Any) -> int:
    """Fill what other ranks have updated; how many buckets."""
    for bucket in group.buckets:
        for number, shard in enumerate(bucket.param_data.chunk(group.intra_distributed_optimizer_instance_size)):
            if number != group.intra_distributed_optimizer_instance_rank:
                shard.fill_(torch.nan)
    return len(group.buckets)


def train_late(rank: int, config: RunConfig) -> int:
    """One rank of a run; how many buckets came late."""
    kind: Any = param_and_grad_buffer._ParamAndGradBucketGroup
    real, real_step = kind.start_param_sync, DistributedOptimizer.step_with_ready_grads
    real_config = optimizer.DistributedDataParallelConfig
    late = 0

    def start(group: Any, force_sync: bool = False) -> None:
        if force_sync:
            real(group, force_sync=True)
        else:
            group.param_gather_handle, group.param_gather_dispatched = Late(group, real), True

    def step(of: Any) -> bool:
        nonlocal late
        done = real_step(of)
        late += sum(spoil(group) for chunk in of.model_chunks for group in chunk.bucket_groups)
        return bool(done)

    kind.start_param_sync, DistributedOptimizer.step_with_ready_grads = start, step
    optimizer.DistributedDataParallelConfig = partial(real_config, bucket_size=BUCKET)  # type: ignore[assignment,misc]
    try:
        train_on_rank(rank, config)
    finally:
        kind.start_param_sync, DistributedOptimizer.step_with_ready_grads = real, real_step
        optimizer.DistributedDataParallelConfig = real_config  # type: ignore[misc]
    return late


def test_no_weight_is_read_before_its_module_runs(pool: RankPool, tmp_path: Path) -> None:
    """The same curve as without overlap, to the rounding of fp32 (other buckets, another order of summing the norm)."""
    parallel = layout(overlap_grad_reduce=True, overlap_param_gather=True)
    pool.run(2, train_on_rank, tiny_run(tmp_path / "plain", steps=3, parallel=layout()))
    shutil.copytree(tmp_path / "plain" / "assets", tmp_path / "late" / "assets")
    late = pool.run(2, train_late, tiny_run(tmp_path / "late", steps=3, parallel=parallel))
    assert min(late) >= 3 * 5
    expected, found = metrics(tmp_path / "plain"), metrics(tmp_path / "late")
    assert len(found) == 3
    for one, other in zip(expected, found, strict=True):
        assert abs(other["loss"] / one["loss"] - 1) < 1e-5
        assert abs(other["grad_norm"] / one["grad_norm"] - 1) < 1e-5

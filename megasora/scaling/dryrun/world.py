"""A world of any size in this process: one rank's groups, whose messages go nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
from megasora.parallel import groups
from megasora.parallel.cpu import enable_cpu_backend
from megasora.parallel.groups import ParallelContext


@contextmanager
def fake_world(config: RunConfig, *, world_size: int, rank: int) -> Iterator[ParallelContext]:
    """The groups of `rank`; gone afterwards, so that the next world can be another.

    The process stays on the CPU backend: its calls to torch.cuda are answered by `megasora.parallel.cpu`.

    Raises:
        UserError: the process is a rank of a real world, or has used CUDA.
    """
    if dist.is_initialized():
        raise UserError("a dry run needs a process without torch.distributed: this one is a rank of a real world")
    if torch.cuda.is_initialized():
        raise UserError("a dry run needs a process that has not used CUDA; start it in one of its own")
    enable_cpu_backend()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield groups.initialize(
            config.parallel, device=torch.device("cpu"), num_attention_heads=config.model.num_attention_heads, seed=config.train.seed
        )
    finally:
        groups.destroy()
        dist.destroy_process_group()

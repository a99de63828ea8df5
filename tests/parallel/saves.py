"""Small checkpoints written by pool ranks, with a lease of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megasora.checkpoint import store
from megasora.checkpoint.lease import Lease
from megasora.checkpoint.writer import CheckpointWriter, Event, Retention
from megasora.models.mmdit.sharded_state import sharded

ROWS = 12
"""Of `split.weight`, which the ranks share out unevenly."""


def values(step: int) -> dict[str, torch.Tensor]:
    """The whole tensors of a step."""
    return {
        "model.split": torch.arange(ROWS * 5, dtype=torch.float32).reshape(ROWS, 5) + step,
        "model.same": torch.full((7,), float(step), dtype=torch.bfloat16),
        "exp_avg.split": torch.arange(ROWS * 5, dtype=torch.float32).reshape(ROWS, 5) * step,
    }


def rectangles(step: int) -> dict[str, ShardedTensor]:
    """This rank's part: a run of rows of the split tensors, and the tensor that all have."""
    rank, size = dist.get_rank(), dist.get_world_size()
    cuts = [ROWS * number * number // (size * size) for number in range(size + 1)]
    start, stop = cuts[rank], cuts[rank + 1]
    result = {}
    for key, whole in values(step).items():
        if key == "model.same":
            result[key] = sharded(key, whole.clone(), tuple(whole.shape), (0,), (0, 0, rank))
        elif stop > start:
            result[key] = sharded(key, whole[start:stop].clone(), tuple(whole.shape), (start, 0), (0, 0, 0))
    return result


def empty(tensors: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    """The same rectangles to load into."""
    for one in tensors.values():
        one.data.fill_(-1)
    return tensors


def loaded_step(folder: Path) -> int:
    """The step whose values a checkpoint holds in this layout, every bit of it; -1 when it is none."""
    tensors = empty(rectangles(0))
    store.load(folder, tensors)
    step = int(tensors["model.same"].data[0])
    expected = rectangles(step)
    same = all(torch.equal(tensors[name].data, expected[name].data) for name in expected)
    return step if same else -1


@contextmanager
def writing(root: Path, *, keep: int = 0, asynchronous: bool = True, beat_s: float = 5.0) -> Iterator[CheckpointWriter]:
    """A writer with a lease, ended as a run ends it."""
    lease = Lease.take(root, beat_s=beat_s) if dist.get_rank() == 0 else None
    try:
        writer = CheckpointWriter(root, lease=lease, asynchronous=asynchronous, retention=Retention(keep=keep))
        try:
            yield writer
        finally:
            writer.abandon()
    finally:
        if lease is not None:
            lease.release()


def save(writer: CheckpointWriter, step: int) -> list[Event]:
    """Save a step and wait for its end."""
    writer.save(step=step, tensors=rectangles(step), state={"n": step})
    writer.wait()
    return writer.poll()


def steps(root: Path) -> list[int]:
    """Complete checkpoints."""
    return [entry.step for entry in store.complete_checkpoints(root)]


def hold(writer: CheckpointWriter) -> threading.Event:
    """Keep a writer's background work from starting until the event is set."""
    gate = threading.Event()
    original = writer._write

    def late(pending: Any) -> None:
        gate.wait()
        original(pending)

    writer._write = late  # type: ignore[method-assign]
    return gate

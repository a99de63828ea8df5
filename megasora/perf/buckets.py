"""How Megatron's distributed optimizer lays parameters out in a buffer and shares it over ranks (ZeRO-1), as arithmetic.

Source: megatron-core 0.16.1, core/distributed/param_and_grad_buffer.py (_ParamAndGradBuffer) and distributed_data_parallel.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PARAMETER_ALIGNMENT = 64
"""Elements: every parameter starts at a multiple."""
BUCKET_ALIGNMENT = 128
"""Elements: every bucket ends at a multiple of this and of the ranks that share it."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A run of the buffer that is reduced and gathered at once."""

    start: int
    end: int
    parameters: tuple[tuple[int, int], ...]
    """(first element, element after the last) of each."""

    def held(self, rank: int, shards: int) -> int:
        """Elements of parameters in the part of one of the ranks that share the bucket evenly."""
        size = (self.end - self.start) // shards
        first, last = self.start + rank * size, self.start + (rank + 1) * size
        return sum(max(0, min(last, end) - max(first, start)) for start, end in self.parameters)


def bucket_size(*, shards: int, overlap: bool, first_stage: bool, first_chunk: bool) -> int | None:
    """Elements after which a bucket is closed; None: one bucket. Only what is on the first stage and in its first chunk is cut, because
    the other stages end their backward passes earlier."""
    return max(40_000_000, 1_000_000 * shards) if overlap and first_stage and first_chunk else None


def lay_out(sizes: Sequence[int], *, shards: int, bucket_size: int | None) -> list[Bucket]:
    """Buckets of parameters of these sizes, given in the order of the model; the buffer holds them in reverse.

    Args:
        sizes: elements of each parameter.
        shards: ranks that share the buffer.
        bucket_size: see `bucket_size`.
    """
    buckets: list[Bucket] = []
    place = start = 0
    held: list[tuple[int, int]] = []

    def close(end: int) -> int:
        nonlocal start
        last = _up(end, math.lcm(shards, BUCKET_ALIGNMENT))
        buckets.append(Bucket(start=start, end=last, parameters=tuple(held)))
        held.clear()
        start = last
        return last

    for size in reversed(sizes):
        place = _up(place, PARAMETER_ALIGNMENT)
        held.append((place, place + size))
        place += size
        if bucket_size is not None and place - start >= bucket_size:
            place = close(place)
    if held:
        close(place)
    return buckets


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

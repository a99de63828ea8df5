"""Megasora's pipeline schedules, event by event: each stage runs its passes in Megatron's order, each pass waits for the one it depends on.

Stages may be unequal, and so may the packs. What a stage does between passes (a message that nothing hides) is its own time.
Order: megatron/core/pipeline_parallel/schedules.py, forward_backward_pipelining_without_interleaving and _with_interleaving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Times = Sequence[Sequence[Sequence[float]]]
"""[stage][chunk][micro-batch] seconds."""
Pass = tuple[bool, int, int]
"""(backward, chunk, micro-batch)."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When each stage was done."""

    end: float
    """Last pass of all stages."""
    busy: tuple[float, ...]
    """Stage -> seconds in its passes."""
    messages: tuple[float, ...]
    """Stage -> seconds in messages that nothing hid."""

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they waited."""
        return 1 - (sum(self.busy) + sum(self.messages)) / (self.end * len(self.busy)) if self.end else 0.0


@lru_cache(maxsize=512)
def order_of(*, stage: int, num_stages: int, chunks: int, num_microbatches: int) -> tuple[Pass, ...]:
    """The passes of a stage in Megatron's order.

    Args:
        stage, num_stages: place in the pipeline.
        chunks: of a stage; one means 1F1B, more the interleaved schedule with groups of as many micro-batches as there are stages.
        num_microbatches: of a step; when interleaved a multiple of the stages.
    """
    if num_stages == 1:
        return tuple((backward, 0, micro) for micro in range(num_microbatches) for backward in (False, True))
    forwards, backwards = _passes(num_stages, chunks, num_microbatches)
    warmup = num_stages - stage - 1
    if chunks > 1:
        warmup = 2 * warmup + (chunks - 1) * num_stages
    warmup = min(warmup, len(forwards))
    order = [(False, *one) for one in forwards[:warmup]]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += [(False, *forward), (True, *backward)]
    order += [(True, *one) for one in backwards[len(forwards) - warmup :]]
    return tuple(order)


def _passes(num_stages: int, chunks: int, num_microbatches: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(chunk, micro-batch) of all forward and of all backward passes, in order."""
    forwards, backwards = [], []
    for start in range(0, num_microbatches, num_stages):
        group = range(start, min(start + num_stages, num_microbatches))
        forwards += [(chunk, micro) for chunk in range(chunks) for micro in group]
        backwards += [(chunk, micro) for chunk in reversed(range(chunks)) for micro in group]
    if chunks == 1:
        return [(0, micro) for micro in range(num_microbatches)], [(0, micro) for micro in range(num_microbatches)]
    return forwards, backwards


def simulate(forward: Times, backward: Times, *, message_s: Sequence[float], overlapped: bool) -> Schedule:
    """Run a step's passes.

    Args:
        forward, backward: seconds of each pass.
        message_s: micro-batch -> seconds of its message between stages.
        overlapped: whether messages travel beside passes (interleaved); otherwise a stage waits for its own.
    """
    stages, chunks, micros = len(forward), len(forward[0]), len(forward[0][0])
    orders = [order_of(stage=stage, num_stages=stages, chunks=chunks, num_microbatches=micros) for stage in range(stages)]
    done: dict[tuple[bool, int, int], float] = {}  # (backward, chunk in pipeline order, micro-batch) -> end
    place, free = [0] * stages, [0.0] * stages
    busy, messages = [0.0] * stages, [0.0] * stages
    last = stages * chunks - 1
    moved = True
    while moved:
        moved = False
        for stage in range(stages):
            order = orders[stage]
            while place[stage] < len(order):
                back, chunk, micro = order[place[stage]]
                number = chunk * stages + stage
                ready = _ready(done, back, number, micro, last=last)
                if ready is None:
                    break
                arrival = ready if (number == last if back else number == 0) else ready + message_s[micro]
                seconds = (backward if back else forward)[stage][chunk][micro]
                end = max(free[stage], arrival) + seconds
                done[back, number, micro] = end
                sends = 0.0 if overlapped or (number == 0 if back else number == last) or stages == 1 else message_s[micro]
                free[stage] = end + sends
                busy[stage] += seconds
                messages[stage] += sends
                place[stage] += 1
                moved = True
    if any(place[stage] < len(orders[stage]) for stage in range(stages)):
        raise RuntimeError("the pipeline's order has a cycle")
    return Schedule(end=max(free), busy=tuple(busy), messages=tuple(messages))


def _ready(done: dict[tuple[bool, int, int], float], back: bool, number: int, micro: int, *, last: int) -> float | None:
    """When what a pass depends on is done; None while it is not."""
    if not back:
        return 0.0 if number == 0 else done.get((False, number - 1, micro))
    if number == last:
        return done.get((False, number, micro))
    return done.get((True, number + 1, micro))

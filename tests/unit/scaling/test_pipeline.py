"""Pipelines event by event, against schedules drawn by hand and Megatron's own tables."""

from __future__ import annotations

from itertools import pairwise

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megasora.scaling.forecast.pipeline import order_of, simulate


def even(stages: int, chunks: int, micros: int, seconds: float) -> list[list[list[float]]]:
    return [[[seconds] * micros for _ in range(chunks)] for _ in range(stages)]


def test_one_stage_has_no_bubble() -> None:
    schedule = simulate(even(1, 1, 3, 1.0), even(1, 1, 3, 2.0), message_s=[0.5] * 3, overlapped=False)
    assert schedule.end == 9.0
    assert schedule.busy == (9.0,)
    assert schedule.messages == (0.0,)


def test_1f1b_takes_the_published_time() -> None:
    """(M + PP - 1)(F + B), the bubble (PP - 1) / (M + PP - 1) of it (Megatron-LM, arXiv 2104.04473, section 2.2)."""
    schedule = simulate(even(4, 1, 8, 1.0), even(4, 1, 8, 2.0), message_s=[0.0] * 8, overlapped=False)
    assert schedule.end == pytest.approx((8 + 3) * 3.0)
    assert schedule.bubble == pytest.approx(3 / 11)


def test_interleaving_divides_the_bubble_by_the_chunks() -> None:
    """The same work in two chunks of half the size: bubble time (PP - 1)(F + B) / VP (arXiv 2104.04473, section 2.2)."""
    schedule = simulate(even(4, 2, 8, 0.5), even(4, 2, 8, 1.0), message_s=[0.0] * 8, overlapped=True)
    assert schedule.end == pytest.approx(8 * 3.0 + 3 * 3.0 / 2)


def test_two_stages_two_micro_batches_by_hand() -> None:
    """F 1, B 2, a message 0.25 that stages wait for: drawn on paper.

    Stage 0: F0 0-1, sends until 1.25, F1 1.25-2.25, sends until 2.5; stage 1: F0 1.25-2.25, B0 2.25-4.25, sends until 4.5, F1 4.5-5.5 (its
    message was there), B1 5.5-7.5, sends until 7.75; stage 0: B0 4.5-6.5, B1 7.75-9.75.
    """
    schedule = simulate(even(2, 1, 2, 1.0), even(2, 1, 2, 2.0), message_s=[0.25, 0.25], overlapped=False)
    assert schedule.end == pytest.approx(9.75)
    assert schedule.busy == (6.0, 6.0)
    assert schedule.messages == pytest.approx((0.5, 0.5))


def test_the_slowest_stage_sets_the_pace() -> None:
    forward = [[[1.0] * 6], [[3.0] * 6]]
    backward = [[[1.0] * 6], [[3.0] * 6]]
    schedule = simulate(forward, backward, message_s=[0.0] * 6, overlapped=False)
    assert schedule.end == pytest.approx(1.0 + 6 * 6.0 + 1.0)  # in, six times the slow stage, out


@pytest.mark.parametrize(("stages", "chunks", "micros"), [(2, 2, 4), (4, 2, 8), (3, 3, 6), (2, 4, 2)])
def test_forward_order_is_megatrons_table(stages: int, chunks: int, micros: int) -> None:
    table = get_schedule_table(micros, chunks, stages)
    for stage in range(stages):
        order = order_of(stage=stage, num_stages=stages, chunks=chunks, num_microbatches=micros)
        assert [(micro, chunk) for back, chunk, micro in order if not back] == list(table)
        assert [(micro, chunks - 1 - chunk) for back, chunk, micro in order if back] == list(table)


@pytest.mark.parametrize(("stages", "chunks", "micros"), [(2, 1, 1), (4, 1, 2), (4, 3, 8), (3, 2, 3), (5, 1, 7)])
def test_every_pass_runs_once_and_in_time(stages: int, chunks: int, micros: int) -> None:
    orders = [order_of(stage=stage, num_stages=stages, chunks=chunks, num_microbatches=micros) for stage in range(stages)]
    for order in orders:
        assert len(set(order)) == len(order) == 2 * chunks * micros
    schedule = simulate(even(stages, chunks, micros, 1.0), even(stages, chunks, micros, 2.0), message_s=[0.1] * micros, overlapped=True)
    assert schedule.end >= 3 * chunks * micros
    ends = [
        simulate(even(stages, chunks, micros, f), even(stages, chunks, micros, 2.0), message_s=[0.1] * micros, overlapped=True).end
        for f in (1, 2, 3)
    ]
    assert all(a < b for a, b in pairwise(ends))

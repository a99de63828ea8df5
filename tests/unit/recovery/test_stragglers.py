"""Who holds the others up, and in what."""

from __future__ import annotations

import pytest

from megasora.recovery.stragglers import PARTS, StepTimer, find_stragglers
from tests.unit.recovery.test_heartbeat import Clock

EVEN = [0.1, 2.0, 0.1, 0.3]
"""Seconds in data, compute, collectives, optimizer."""


def test_the_parts_are_in_the_order_of_the_tables() -> None:
    assert PARTS == ("data", "compute", "collectives", "optimizer")


def test_even_ranks_are_not_named() -> None:
    assert find_stragglers([EVEN] * 4, ["a", "a", "b", "b"]) == []


def test_a_slow_rank_is_named_with_what_it_is_slow_in() -> None:
    times = [[0.1, 2.0, 1.1, 0.3], [0.1, 3.0, 0.1, 0.3], [0.1, 2.0, 1.1, 0.3], [0.1, 2.0, 1.1, 0.3]]
    (slow,) = find_stragglers(times, ["a", "a", "b", "b"])
    assert (slow.ranks, slow.host, slow.part, slow.seconds, slow.median_s) == ([1], "a", "compute", 3.0, 2.0)
    assert slow.line() == "slow: rank 1 on a, compute 3.000 s a step, 1.5 x the median of 2.000 s"


def test_a_host_whose_ranks_are_all_slow_is_one_entry() -> None:
    slow_reader = [4.0, 2.0, 0.1, 0.3]
    (slow,) = find_stragglers([EVEN, EVEN, EVEN, EVEN, slow_reader, slow_reader], ["a", "a", "b", "b", "c", "c"])
    assert (slow.ranks, slow.host, slow.part) == ([4, 5], "c", "data")
    assert "all 2 ranks of c" in slow.line()


def test_what_costs_nothing_is_not_named() -> None:
    assert find_stragglers([EVEN, EVEN, EVEN, [0.14, 2.0, 0.1, 0.3]], ["a"] * 4) == []  # 1.4 x the median, 1.6 % of a step


def test_host_times_are_means_of_the_steps_since_the_last_report() -> None:
    clock = Clock()
    timer = StepTimer(clock=clock)
    for data_s in (1.0, 3.0):
        for part, seconds in (("data", data_s), ("compute", 5.0), ("collectives", 0.5), ("optimizer", 1.0), (None, 60.0)):
            timer.enter(part)  # type: ignore[arg-type]
            clock.now += seconds
        timer.step()
    assert timer.take() == pytest.approx([2.0, 5.0, 0.5, 1.0])
    assert timer.take() == [0.0] * 4


class DeviceMark:
    """A device's point in time, which must not be read before the step after."""

    readable = False

    def __init__(self, at: float) -> None:
        self.at = at

    def elapsed_time(self, end: DeviceMark) -> float:
        assert DeviceMark.readable, "the host would wait for the device"
        return (end.at - self.at) * 1000


def test_device_times_are_read_one_step_later() -> None:
    host, device = Clock(), Clock()
    timer = StepTimer(record=lambda: DeviceMark(device.now), clock=host)

    def step(number: int) -> None:
        for part, host_s, device_s in (("data", 1.0, 0.0), ("compute", 0.1, 5.0), ("collectives", 4.0, 0.5), ("optimizer", 0.1, 1.0)):
            timer.enter(part)  # type: ignore[arg-type]
            host.now += host_s
            device.now += device_s
        DeviceMark.readable = number > 0
        timer.step()
        DeviceMark.readable = False

    for number in range(3):
        step(number)
    assert timer.take() == pytest.approx([1.0, 5.0 * 2 / 3, 0.5 * 2 / 3, 1.0 * 2 / 3])

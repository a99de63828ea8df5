"""Every second of a run has one name, over all its incarnations."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasora.recovery.folder import RecoveryFolder
from megasora.recovery.goodput import GoodputMeter, read_incarnations, total
from tests.unit.recovery.test_heartbeat import Clock


def run(meter: GoodputMeter, clock: Clock, steps: range, *, save: bool = False) -> None:
    """Steps of 1 s waiting, 3 s computing, 1 s optimizer and, asked for, 2 s saving."""
    for step in steps:
        for phase, seconds in (("data", 1), ("forward_backward", 3), ("optimizer", 1), *([("save", 2)] if save else [])):
            meter.beat(step, phase)  # type: ignore[arg-type]
            clock.now += seconds


def meter_of(folder: RecoveryFolder, incarnation: int, clock: Clock) -> GoodputMeter:
    return GoodputMeter(folder, incarnation, every_s=0, clock=clock, wall=clock)


def test_one_incarnation_sums_up_to_its_wall_time(tmp_path: Path) -> None:
    clock = Clock()
    meter = meter_of(RecoveryFolder(tmp_path), 1, clock)
    clock.now += 7
    run(meter, clock, range(1, 3), save=True)
    meter.close(finished=True)
    goodput = meter.total()
    assert goodput.productive_s == 8
    assert goodput.data_s == 2
    assert goodput.save_s == 4
    assert goodput.start_s == 7
    assert goodput.wall_s == 21
    assert goodput.share == pytest.approx(8 / 21)


def test_steps_made_again_and_restarts_are_lost_time(tmp_path: Path) -> None:
    clock, folder = Clock(), RecoveryFolder(tmp_path)
    first = meter_of(folder, 1, clock)
    run(first, clock, range(1, 5))
    first.beat(5, "data")  # dies here: steps 1 to 4 are made, 1 and 2 are saved
    clock.now += 30
    second = meter_of(folder, 2, clock)
    clock.now += 10
    run(second, clock, range(3, 7))
    second.close(finished=True)
    goodput = total(read_incarnations(folder))
    assert goodput.redone_s == 10
    assert goodput.restarts_s == 40
    assert goodput.productive_s == 4 * 4 + 2 * 4
    assert goodput.data_s == 4 + 2
    assert goodput.incarnations == 2
    assert goodput.wall_s == pytest.approx(sum((24, 6, 10, 40)))


def test_the_night_after_an_ordered_stop_is_not_lost(tmp_path: Path) -> None:
    clock, folder = Clock(), RecoveryFolder(tmp_path)
    first = meter_of(folder, 1, clock)
    run(first, clock, range(1, 3))
    first.close(finished=True)
    clock.now += 36_000
    second = meter_of(folder, 2, clock)
    clock.now += 5
    run(second, clock, range(3, 4))
    second.close(finished=True)
    goodput = second.total()
    assert goodput.restarts_s == 0
    assert goodput.start_s == 5
    assert goodput.wall_s == 20


def test_half_a_line_is_left_out(tmp_path: Path) -> None:
    clock, folder = Clock(), RecoveryFolder(tmp_path)
    meter_of(folder, 1, clock).write()
    with folder.goodput.open("a") as file:
        file.write('{"incarnation": 2, "beg')
    assert [record.incarnation for record in read_incarnations(folder)] == [1]


def test_a_clock_that_is_set_changes_no_time(tmp_path: Path) -> None:
    """By hours, forward and back, while an incarnation runs."""
    clock, wall, folder = Clock(), Clock(), RecoveryFolder(tmp_path)
    meter = GoodputMeter(folder, 1, every_s=0, clock=clock, wall=lambda: clock.now + wall.now)
    clock.now += 7
    for hours in (3, -9):
        run(meter, clock, range(1, 3) if hours == 3 else range(3, 5))
        wall.now += hours * 3600
    meter.close(finished=False)
    clock.now += 30
    second = GoodputMeter(folder, 2, every_s=0, clock=clock, wall=lambda: clock.now + wall.now)
    second.close(finished=True)
    goodput = second.total()
    assert (goodput.wall_s, goodput.start_s, goodput.restarts_s) == (7 + 20 + 30, 7, 30)

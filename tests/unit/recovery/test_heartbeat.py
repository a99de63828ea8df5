"""A heartbeat says where a rank is, costs next to nothing, and never ends the run."""

from __future__ import annotations

import time
from pathlib import Path

from megasora.recovery.folder import RecoveryFolder
from megasora.recovery.heartbeat import Heartbeat, Seat, read_beat, read_beats


def seat(rank: int, *, incarnation: int = 1) -> Seat:
    return Seat(rank=rank, world_size=2, incarnation=incarnation, host="a", pid=100 + rank)


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_file_is_written_at_most_once_a_second(tmp_path: Path) -> None:
    clock, folder = Clock(), RecoveryFolder(tmp_path)
    heartbeat = Heartbeat(folder, seat(1), clock=clock)
    heartbeat.beat(1, "data")
    clock.now += 0.5
    heartbeat.beat(1, "forward_backward")
    first = read_beat(folder, 1)
    clock.now += 0.6
    heartbeat.beat(2, "data")
    second = read_beat(folder, 1)
    assert first is not None and (first.step, first.phase) == (1, "data")
    assert second is not None and (second.step, second.phase, second.host, second.pid) == (2, "data", "a", 101)


def test_another_thread_renews_the_sign_of_life_but_not_the_beat(tmp_path: Path) -> None:
    clock, folder = Clock(), RecoveryFolder(tmp_path)
    heartbeat = Heartbeat(folder, seat(0), clock=clock)
    heartbeat.beat(3, "save")
    before = read_beat(folder, 0)
    clock.now += 2
    heartbeat.renew()
    after = read_beat(folder, 0)
    assert before is not None and after is not None
    assert after.time == before.time
    assert after.alive > before.alive


def test_a_folder_that_is_gone_does_not_end_the_run(tmp_path: Path) -> None:
    Heartbeat(RecoveryFolder(tmp_path / "gone"), seat(0)).beat(1, "data")


def test_the_median_step_counts_steps_not_phases(tmp_path: Path) -> None:
    clock = Clock()
    heartbeat = Heartbeat(RecoveryFolder(tmp_path), seat(0), clock=clock)
    assert heartbeat.median_step_s is None
    for step, seconds in ((1, 2.0), (2, 4.0), (3, 90.0), (4, 0.0)):
        heartbeat.beat(step, "data")
        heartbeat.beat(step, "optimizer")
        clock.now += seconds
    assert heartbeat.median_step_s == 4.0


def test_only_the_newest_incarnation_is_read(tmp_path: Path) -> None:
    folder = RecoveryFolder(tmp_path)
    Heartbeat(folder, seat(0, incarnation=2)).write()
    Heartbeat(folder, seat(1, incarnation=1)).write()
    folder.heartbeat(7).write_text("{half")
    assert list(read_beats(folder)) == [0]
    assert list(read_beats(folder, incarnation=1)) == [1]


def test_a_beat_that_is_not_due_takes_microseconds(tmp_path: Path) -> None:
    heartbeat = Heartbeat(RecoveryFolder(tmp_path), seat(0), every_s=1000)
    heartbeat.beat(1, "data")
    started = time.thread_time()
    for _ in range(1000):
        heartbeat.beat(1, "data")
    assert (time.thread_time() - started) / 1000 < 50e-6

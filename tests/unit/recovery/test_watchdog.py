"""A hang is what lasts longer than such a phase may; a process that was suspended accuses nobody."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megasora.config.schema import RecoveryConfig
from megasora.recovery import heartbeat as heartbeat_module
from megasora.recovery.folder import RecoveryFolder, write_json
from megasora.recovery.heartbeat import Heartbeat, Seat
from megasora.recovery.last_resort import LastResort
from megasora.recovery.watchdog import Hang, HangLimits, PeerWatch, Watchdog, read_hang
from tests.unit.recovery.test_heartbeat import Clock

LIMITS = HangLimits.of(RecoveryConfig(), decode_timeout_s=120.0)


def seat(rank: int) -> Seat:
    return Seat(rank=rank, world_size=4, incarnation=1, host="a", pid=100 + rank)


def watchdog(folder: RecoveryFolder, clock: Clock, rank: int = 2) -> tuple[Heartbeat, Watchdog]:
    heartbeat = Heartbeat(folder, seat(rank), clock=clock)
    return heartbeat, Watchdog(heartbeat, limits=LIMITS, on_hang=lambda hang: None)


def look_for(seconds: int, dog: Watchdog, clock: Clock) -> Hang | None:
    """Looks of every second."""
    for _ in range(seconds):
        clock.now += 1
        if (hang := dog.look()) is not None:
            return hang
    return None


def test_limits_follow_the_phase_and_the_pace() -> None:
    assert LIMITS.allowed_s("forward_backward", 1.0) == 25.0
    assert LIMITS.allowed_s("optimizer", 30.0) == 300.0
    assert LIMITS.allowed_s("data", 1.0) == 145.0
    assert LIMITS.allowed_s("save", 1.0) == 1800.0
    assert LIMITS.allowed_s("forward_backward", None) == 900.0
    assert LIMITS.allowed_s("start", None) == 3600.0


def test_a_step_of_a_second_is_found_hung_within_thirty(tmp_path: Path) -> None:
    clock = Clock()
    heartbeat, dog = watchdog(RecoveryFolder(tmp_path), clock)
    heartbeat.beat(1, "forward_backward")
    clock.now += 1
    heartbeat.beat(2, "forward_backward")
    began = clock.now
    hang = look_for(60, dog, clock)
    assert hang is not None and (hang.rank, hang.step, hang.phase) == (2, 2, "forward_backward")
    assert clock.now - began < 30


def test_a_beat_starts_the_count_again(tmp_path: Path) -> None:
    clock = Clock()
    heartbeat, dog = watchdog(RecoveryFolder(tmp_path), clock)
    heartbeat.beat(1, "data")
    for step in range(2, 8):
        heartbeat.beat(step, "data")
        assert look_for(20, dog, clock) is None


def test_all_ranks_read_the_first_verdict(tmp_path: Path) -> None:
    clock, folder = Clock(), RecoveryFolder(tmp_path)
    dogs = {}
    for rank in (2, 3):
        heartbeat, dogs[rank] = watchdog(folder, clock, rank)
        heartbeat.beat(1, "optimizer")
        heartbeat.beat(2, "optimizer")
    first = look_for(60, dogs[2], clock)
    assert first is not None
    assert dogs[3].look() == first
    assert read_hang(folder, 1) == first
    assert read_hang(folder, 2) is None


def test_a_suspended_process_counts_afresh(tmp_path: Path) -> None:
    clock = Clock()
    heartbeat, dog = watchdog(RecoveryFolder(tmp_path), clock)
    heartbeat.beat(1, "forward_backward")
    heartbeat.beat(2, "forward_backward")
    look_for(5, dog, clock)
    clock.now += 3600  # Ctrl-Z, or the job was suspended
    assert look_for(20, dog, clock) is None
    assert look_for(10, dog, clock) is not None


def beat_file(folder: RecoveryFolder, rank: int, *, alive: float, phase: str = "forward_backward", step: int = 3, host: str = "b") -> None:
    record = {
        "rank": rank,
        "world_size": 4,
        "incarnation": 1,
        "host": host,
        "pid": 1,
        "step": step,
        "phase": phase,
        "time": 0.0,
        "alive": alive,
    }
    write_json(folder.heartbeat(rank), record)


def test_a_process_that_writes_no_more_is_named_by_this_hosts_clock(tmp_path: Path) -> None:
    folder = RecoveryFolder(tmp_path)
    peers = PeerWatch(folder, seat(0), limits=LIMITS)
    for now in range(0, 150, 2):  # between the limits of a step and of a save
        beat_file(folder, 1, alive=1e9)  # its host's clock is of no interest, only that the stamp stands still
        beat_file(folder, 2, alive=5.0 + now)
        beat_file(folder, 3, alive=7.0, phase="save")
        silent = peers.silent(float(now))
    assert silent == [1]


def waits_for_another(dog: Watchdog, clock: Clock, *, phase: str, step: int = 2, host: str = "a", alive_for: int = 10_000) -> float | None:
    """Seconds until the verdict on a rank in a message of step 2, another one being alive in a phase; None within 400."""
    began = clock.now
    for second in range(400):
        clock.now += 1
        beat_file(dog._folder, 1, alive=float(1 + min(second, alive_for)), phase=phase, step=step, host=host)
        if dog.look() is not None:
            return clock.now - began
    return None


@pytest.mark.parametrize(
    ("peer", "at_least", "at_most"),
    [
        ({"phase": "forward_backward"}, 25, 27),  # a hang in a message, as ever
        ({"phase": "data"}, 145, 147),  # as long as a clip may take, and no longer
        ({"phase": "data", "step": 3}, 25, 27),  # that one is through with this step: it is not what is waited for
        ({"phase": "data", "alive_for": 0}, 25, 31),  # stopped while it waited
        ({"phase": "data", "alive_for": 0, "host": "b"}, 100, 120),  # files of another host may be seen late
        ({"phase": "data", "alive_for": 60}, 60, 67),
    ],
)
def test_a_rank_may_wait_for_one_that_waits_for_a_clip(tmp_path: Path, peer: dict[str, Any], at_least: int, at_most: int) -> None:
    clock = Clock()
    heartbeat, dog = watchdog(RecoveryFolder(tmp_path), clock)
    heartbeat.beat(1, "forward_backward")
    clock.now += 1
    heartbeat.beat(2, "forward_backward")
    waited = waits_for_another(dog, clock, **peer)
    assert waited is not None and at_least <= waited <= at_most


def test_a_full_disk_makes_nobody_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank can write its heartbeat; the run goes on without checkpoints, as it says."""
    clock, folder = Clock(), RecoveryFolder(tmp_path)
    for rank in (1, 3):
        beat_file(folder, rank, alive=5.0)
    heartbeat, dog = watchdog(folder, clock, rank=0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(heartbeat_module, "write_json", full)
        for step in range(1, 60):
            heartbeat.beat(step, "forward_backward")
            assert look_for(5, dog, clock) is None
    for step in range(60, 120):  # there is room again: the others have two minutes to be heard
        heartbeat.beat(step, "forward_backward")
        if (hang := look_for(5, dog, clock)) is not None:
            break
    assert hang is not None and hang.silent_ranks == [1, 3]
    assert (step - 60) * 5 >= 110


def test_a_rank_that_left_a_record_is_not_silent(tmp_path: Path) -> None:
    folder = RecoveryFolder(tmp_path)
    peers = PeerWatch(folder, seat(0), limits=LIMITS)
    beat_file(folder, 1, alive=1.0)
    folder.exit(1, 1).write_text("{}")
    assert not peers.silent(0.0)
    assert not peers.silent(1000.0)


def test_stacks_and_record_are_left_before_the_end(tmp_path: Path) -> None:
    folder = RecoveryFolder(tmp_path)
    heartbeat = Heartbeat(folder, Seat(rank=0, world_size=1, incarnation=1, host="a", pid=1))
    seen: list[object] = []
    limits = replace(LIMITS, floor_s=0.0, factor=0.0)
    dog = Watchdog(heartbeat, limits=limits, on_hang=seen.append, poll_s=0.02, end=seen.append)
    heartbeat.beat(1, "optimizer")
    heartbeat.beat(2, "optimizer")
    dog.start()
    while len(seen) < 2:
        heartbeat.clock()
    dog.stop()
    assert isinstance(seen[0], Hang) and seen[1] == 75
    assert "test_stacks_and_record_are_left_before_the_end" in folder.stacks(1, 0).read_text()


def test_a_watchdog_that_found_nothing_leaves_nothing(tmp_path: Path) -> None:
    folder = RecoveryFolder(tmp_path)
    heartbeat = Heartbeat(folder, Seat(rank=0, world_size=1, incarnation=1, host="a", pid=1))
    dog = Watchdog(heartbeat, limits=LIMITS, on_hang=lambda hang: None, poll_s=0.02)
    dog.start()
    dog.stop()
    assert not folder.stacks(1, 0).exists()


def test_a_save_beside_the_steps_has_a_limit_of_its_own(tmp_path: Path) -> None:
    clock = Clock()
    heartbeat, dog = watchdog(RecoveryFolder(tmp_path), clock)
    began = clock.now
    saving = [began]
    heartbeat.saving_since = lambda: saving[0] if saving else None
    for step in range(2, 122):
        heartbeat.beat(step, "data")
        hang = look_for(15, dog, clock)  # steps go on
    assert hang is None and clock.now - began == 1800
    heartbeat.beat(122, "data")
    hang = look_for(2, dog, clock)
    assert hang is not None and (hang.phase, hang.waited_s, hang.allowed_s) == ("save", 1801.0, 1800.0)


def test_who_writes_is_named_before_who_waits_for_it(tmp_path: Path) -> None:
    """Both are in the same save; the one whose own part is written looks first, by chance."""
    clock, folder = Clock(), RecoveryFolder(tmp_path)
    (waiting, first), (writing, second) = (watchdog(folder, clock, rank) for rank in (2, 3))
    began = clock.now
    for heartbeat in (waiting, writing):
        heartbeat.beat(1, "forward_backward")
        heartbeat.beat(2, "save")
    writing.saving_since = lambda: began
    found = None
    while found is None:
        clock.now += 1
        found = first.look() or second.look()
    assert (found.rank, found.phase) == (3, "save")
    assert clock.now - began < LIMITS.save_s + 3


def test_a_save_that_has_ended_is_no_hang(tmp_path: Path) -> None:
    clock = Clock()
    heartbeat, dog = watchdog(RecoveryFolder(tmp_path), clock)
    began = clock.now
    heartbeat.saving_since = lambda: began if clock.now < began + 60 else None
    heartbeat.beat(1, "optimizer")
    heartbeat.beat(2, "evaluate")
    assert look_for(3000, dog, clock) is None


def test_the_last_resort_leaves_the_watchdog_its_time(tmp_path: Path) -> None:
    clock, over = Clock(), [0.0]
    resort = LastResort(lambda since: over[0], grace_s=30.0, code=75, clock=clock)
    for over[0] in (-5.0, 10.0, 30.0):
        clock.now += 1
        assert not resort.look()
    over[0] = 31.0
    assert resort.look()


def test_a_suspended_process_is_not_ended_by_the_last_resort() -> None:
    clock = Clock()
    began = clock.now
    resort = LastResort(lambda since: clock.now - max(began, since), grace_s=30.0, code=75, clock=clock)
    clock.now += 7200
    assert not resort.look()

"""One run at a time writes a run's checkpoints: who is refused, who takes over, and how a run notices."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from megasora.checkpoint import lease as lease_module
from megasora.checkpoint.lease import Lease, LeaseLostError, Token, current_owner
from megasora.config.errors import UserError

ELSEWHERE = replace(Token.own({}), host="node7", place="another boot")
SLURM = {"SLURM_JOB_ID": "4711"}


@contextmanager
def held(root: Path, *, token: Token | None = None, beat_s: float = 60.0) -> Iterator[Lease]:
    """A lease of a run that is alive."""
    lease = Lease.take(root, token=token, beat_s=beat_s)
    try:
        yield lease
    finally:
        lease.release()


def taken(root: Path, *, token: Token | None = None, force: bool = False, watch_s: float = 0.3) -> int:
    """The incarnation of a run that starts and ends at once."""
    lease = Lease.take(root, token=token, force=force, watch_s=watch_s, beat_s=60)
    lease.release()
    return lease.incarnation


def test_a_second_run_is_refused_in_one_line_with_who_has_it(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(UserError) as raised:
        taken(tmp_path)
    said = str(raised.value)
    assert "\n" not in said
    assert re.search(rf"alive \(host {os.uname().nodename}, pid {os.getpid()}, for \d+ min\)", said)
    assert "--checkpoint.take_over" in said


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_clock_that_is_set_neither_frees_nor_takes_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    with held(tmp_path, token=ELSEWHERE, beat_s=0.05) as lease:
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + hours * 3600)
        with pytest.raises(UserError, match="is alive"):
            taken(tmp_path)
        lease.check()
    assert taken(tmp_path) == 2


def test_numbers_only_go_up(tmp_path: Path) -> None:
    assert [taken(tmp_path / "new" / "folder") for _ in range(3)] == [1, 2, 3]
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [".owner_00000003.json"]


def test_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    program = f"from pathlib import Path; import time; from megasora.checkpoint.lease import Lease\nLease.take(Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", f"{program}; print('mine', flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"mine\n"
        with pytest.raises(UserError, match=f"pid {process.pid}"):
            taken(tmp_path)
    finally:
        process.kill()
        process.communicate()
    assert taken(tmp_path) == 2


def test_another_process_of_the_same_number_is_not_the_owner(tmp_path: Path) -> None:
    Lease.take(tmp_path, token=replace(Token.own({}), started="1"), beat_s=60)
    assert taken(tmp_path) == 2


def test_a_run_on_another_host_lives_while_its_counter_changes(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path, token=ELSEWHERE, beat_s=0.05)
    with pytest.raises(UserError, match="host node7"):
        taken(tmp_path, watch_s=5)
    lease._stop.set()  # its host has crashed
    lease._thread.join()
    assert taken(tmp_path) == 2


def test_a_run_that_ended_is_not_watched(tmp_path: Path) -> None:
    taken(tmp_path, token=ELSEWHERE)
    started = time.monotonic()
    assert taken(tmp_path, watch_s=30) == 2
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("before", "now", "waits"),
    [
        ({}, {"SLURM_RESTART_COUNT": "1"}, False),
        ({"SLURM_RESTART_COUNT": "2"}, {"SLURM_RESTART_COUNT": "3"}, False),
        ({"SLURM_RESTART_COUNT": "1"}, {"SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_JOB_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, True),
    ],
)
def test_a_requeued_job_takes_over_from_itself_at_once(tmp_path: Path, before: dict[str, str], now: dict[str, str], waits: bool) -> None:
    old = replace(Token.own(SLURM | before), host="node7", place="another boot")
    with held(tmp_path, token=old, beat_s=0.05):
        if waits:
            with pytest.raises(UserError, match=r"SLURM job \d+"):
                taken(tmp_path, token=Token.own(SLURM | now), watch_s=5)
        else:
            assert taken(tmp_path, token=Token.own(SLURM | now), watch_s=60) == 2


def test_take_over_forces_and_the_other_notices(tmp_path: Path) -> None:
    with held(tmp_path, beat_s=0.05) as lease:
        lease.check()
        assert taken(tmp_path, force=True) == 2
        with pytest.raises(LeaseLostError, match=r"another run has taken over .*pid \d+"):
            lease.check()
        deadline = time.monotonic() + 10
        while not lease.lost and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lease.lost
    owner = current_owner(tmp_path)
    assert owner is not None and owner.incarnation == 2


def test_of_many_at_the_same_moment_no_two_get_one_number(tmp_path: Path) -> None:
    won: list[int] = []
    barrier = threading.Barrier(8)

    def run() -> None:
        barrier.wait()
        for _ in range(5):
            try:
                won.append(taken(tmp_path, force=True))
            except UserError:
                continue

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won and len(set(won)) == len(won)


def test_the_heartbeat_needs_no_room(tmp_path: Path) -> None:
    with held(tmp_path, beat_s=0.02):
        (file,) = tmp_path.glob(".owner_*")
        first = file.stat()
        contents = set()
        deadline = time.monotonic() + 10
        while len(contents) < 4 and time.monotonic() < deadline:
            contents.add(file.read_bytes())
        assert len(contents) >= 4
        assert (file.stat().st_ino, file.stat().st_size) == (first.st_ino, first.st_size)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/checkpoints cannot take checkpoints: Not a directory; .*--run_dir"):
        Lease.take(tmp_path / "file" / "checkpoints")


def test_an_owner_is_alive_while_it_removes_what_others_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of gigabytes of a half-written checkpoint may take minutes; nobody may take over meanwhile."""
    crashed = Lease.take(tmp_path, token=ELSEWHERE, beat_s=60)
    (crashed.work / "step_00000001").mkdir()
    removing, go_on = threading.Event(), threading.Event()
    rmtree = shutil.rmtree

    def slow(path: Path, **options: bool) -> None:
        if "step_00000001" in str(path):
            removing.set()
            go_on.wait(20)
        rmtree(path, **options)

    monkeypatch.setattr(lease_module.shutil, "rmtree", slow)
    crashed._stop.set()  # its host went down
    crashed._thread.join()
    with held(tmp_path, token=replace(ELSEWHERE, host="node8"), beat_s=0.05):
        assert removing.wait(10)
        with pytest.raises(UserError, match="is alive"):
            taken(tmp_path)
        go_on.set()

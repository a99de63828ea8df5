"""Disks that fill up, become read-only or cannot be read, under whole runs: each is said, costs what was not saved, and passes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from megasora.checkpoint import manifests, store
from megasora.config.schema import ParallelConfig, RunConfig
from megasora.training.checkpoints import Checkpoints
from tests.faults.kills import INTERVAL, run_config
from tests.parallel.runs import metrics, train_on_rank
from tests.parallel.test_training import assert_same_curve
from tests.pool import RankPool

STEPS = 8
BAD = 4
"""The step whose save finds the disk bad."""
Disk = Callable[[Path], None]


@contextmanager
def before_saves(happens: dict[int, Callable[[], object]]) -> Iterator[None]:
    """Let something happen just before the save of a step."""
    real = Checkpoints.save

    def save(checkpoints: Checkpoints, trainee: Any, *, guard: Any) -> None:
        checkpoints._writer.wait()  # one bad save, not the one before it too
        happens.get(trainee.step, lambda: None)()
        real(checkpoints, trainee, guard=guard)

    Checkpoints.save = save  # type: ignore[method-assign]
    try:
        yield
    finally:
        Checkpoints.save = real  # type: ignore[method-assign]


def fill(ballast: Path, *, left_bytes: int) -> None:
    """Take all the room but some."""
    room = os.statvfs(ballast.parent)
    ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - left_bytes))


def fills_up(rank: int, config: RunConfig, left_bytes: int) -> None:
    """Train; the disk has no room for the save of step BAD and has again for the next one."""
    ballast = Path(str(config.run_dir)) / "ballast"
    happens = {BAD: lambda: fill(ballast, left_bytes=left_bytes), BAD + INTERVAL: ballast.unlink} if rank == 0 else {}
    with before_saves(happens):
        train_on_rank(rank, config)


def becomes_read_only(rank: int, config: RunConfig, left_bytes: int) -> None:
    """Train; the checkpoints' file system cannot be written at the save of step BAD."""
    root = f"{config.run_dir}/checkpoints"

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", root], check=True)

    happens = {BAD: lambda: remount("ro"), BAD + INTERVAL: lambda: remount("rw")} if rank == 0 else {}
    with before_saves(happens):
        train_on_rank(rank, config)


def events(run_dir: Path) -> list[dict[str, Any]]:
    """Of saves and restarts, in the order of the records."""
    return [
        event
        for record in metrics(run_dir)
        for event in record["events"]
        if event["event"] in ("checkpoint", "checkpoint_failed", "restart")
    ]


def config_of(run_dir: Path, straight: Path) -> RunConfig:
    (run_dir / "assets").symlink_to(straight / "assets")
    config = run_config(run_dir, ParallelConfig(), steps=STEPS)
    return replace(config, train=replace(config.train, tensorboard=True))


@pytest.mark.parametrize(
    ("work", "left_bytes", "disk", "said"),
    [
        (fills_up, 0, "run", "No space left on device"),  # metrics.jsonl has no room either
        (fills_up, 200 << 10, "run", "No space left on device"),  # in the middle of the save
        (becomes_read_only, 0, "run/checkpoints", "Read-only file system"),
    ],
    ids=["full", "fills up", "read-only"],
)
def test_a_bad_disk_costs_the_saves_it_was_bad_for(
    pool: RankPool, straight: Path, small_disk: Disk, tmp_path: Path, work: Callable[..., None], left_bytes: int, disk: str, said: str
) -> None:  # fmt: skip
    run_dir = tmp_path / "run"
    small_disk(tmp_path / disk)
    pool.run(2, work, config_of(run_dir, straight), left_bytes)
    assert_same_curve(run_dir, straight, steps=STEPS)  # every step has its record, also those of a full disk
    found = events(run_dir)
    assert [event["event"] for event in found] == ["checkpoint", "checkpoint_failed", "checkpoint", "checkpoint"]
    assert said in found[1]["reason"]
    assert found[1]["said"].startswith(f"the checkpoint of step {BAD} could not be written")
    assert [entry.step for entry in store.complete_checkpoints(run_dir / "checkpoints")] == [6, 8]


def cannot_be_read(rank: int, config: RunConfig, name: str) -> None:
    """Go on with a run; the last rank's reads of a file of its newest checkpoint fail, rank 0's of the manifest."""
    newest = f"step_{BAD:08d}/{name}"
    with pytest.MonkeyPatch.context() as patch:
        digest, text = hashlib.file_digest, Path.read_text

        def failing(file: BinaryIO, *arguments: Any) -> Any:
            if str(file.name).endswith(newest):
                raise OSError(errno.EIO, os.strerror(errno.EIO), file.name)
            return digest(file, *arguments)

        def failing_text(path: Path, *arguments: Any, **options: Any) -> str:
            if str(path).endswith(newest):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return text(path, *arguments, **options)

        patch.setattr(hashlib, "file_digest", failing)
        patch.setattr(Path, "read_text", failing_text)
        train_on_rank(rank, config)


@pytest.mark.parametrize("name", ["__1_0.distcp", manifests.NAME])
def test_a_checkpoint_that_cannot_be_read_is_said_and_the_one_before_taken(
    pool: RankPool, straight: Path, tmp_path: Path, name: str
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = config_of(run_dir, straight)
    pool.run(2, train_on_rank, replace(config, train=replace(config.train, steps=BAD)))
    pool.run(2, cannot_be_read, config, name)
    (restart,) = [event for event in events(run_dir) if event["event"] == "restart"]
    assert restart["step"] == BAD - INTERVAL
    (refused,) = restart["refused"]
    assert refused["path"] == f"step_{BAD:08d}" and "Input/output error" in refused["reason"]
    assert_same_curve(run_dir, straight, steps=STEPS)


def test_a_clip_that_hangs_costs_the_clip(pool: RankPool, straight: Path, tmp_path: Path) -> None:
    """Its file is a pipe that nobody writes to: to open it takes for ever, in the kernel."""
    run_dir = tmp_path / "run"
    shutil.copytree(straight / "assets", run_dir / "assets")
    clip = min((run_dir / "assets").rglob("*.mp4"))
    clip.unlink()
    os.mkfifo(clip)
    config = run_config(run_dir, ParallelConfig(), steps=6)
    pool.run(2, train_on_rank, replace(config, data=replace(config.data, decode_timeout_s=1.0)))
    skips = [event for record in metrics(run_dir) for event in record["events"] if event["event"] == "skip"]
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, 7))
    assert skips and all(skip["clip"] == skips[0]["clip"] for skip in skips)
    assert "longer than 1 s" in skips[0]["reason"]

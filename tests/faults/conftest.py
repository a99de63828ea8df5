"""What the faults share: a run that nothing happened to, and a small file system."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.kills import run_config
from tests.parallel.runs import train_on_rank
from tests.parallel.test_training import layout
from tests.pool import RankPool


@pytest.fixture(scope="package")
def straight(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one rank, never disturbed."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    pool.run(1, train_on_rank, run_config(run_dir, layout()))
    return run_dir


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path], None]]:
    """What mounts a file system of 32 MiB over a folder."""
    mounted: list[Path] = []

    def mount(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system of its own for this test, which only root may mount: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)

"""The cluster, and a run without interruptions to compare with."""

from __future__ import annotations

import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parallel.runs import train_on_rank
from tests.pool import RankPool
from tests.slurm.cluster import Cluster, ClusterError
from tests.slurm.jobs import SETTINGS, STEPS, Jobs, settings_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    """Three nodes of four CPUs."""
    try:
        running = Cluster(nodes=3, cpus=4)
    except ClusterError as error:
        pytest.skip(f"no Slurm: {error}")
    yield running
    running.close()


@pytest.fixture(scope="package")
def straight(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run, by one rank."""
    run_dir = tmp_path_factory.mktemp("straight")
    pool.run(1, train_on_rank, settings_of(["--run_dir", str(run_dir), *SETTINGS, "--train.steps", str(STEPS)]))
    return run_dir


@pytest.fixture
def jobs(cluster: Cluster, straight: Path, tmp_path: Path) -> Iterator[Jobs]:
    """Jobs in a folder of their own that holds the clips and encoders already; their last words are shown when a test fails."""
    shutil.copytree(straight / "assets", tmp_path / "run" / "assets")
    program = tmp_path / "bin" / "megasora"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m megasora "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    python = Path(sys.executable).parent
    variables = {
        "PATH": f"{program.parent}:{python}:{cluster.environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",  # n1 is no name of the machine
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    made = Jobs(cluster, folder=tmp_path, straight=straight, variables=variables)
    yield made
    made.close()

"""Worlds of two ranks as processes of their own, and what to do to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from megasora.recovery.folder import RecoveryFolder
from megasora.recovery.heartbeat import STEP_PHASES, Beat, read_beat

T = TypeVar("T")
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """Start of some ports that nobody uses; a supervised world takes 52."""
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        port: int = sock.getsockname()[1]
    return port if port < 65000 else port - 1000


@contextlib.contextmanager
def started(words: Sequence[str], *, ranks: int = 2) -> Iterator[list[subprocess.Popen[str]]]:
    """`python -m WORDS` once a rank, as srun would; all are gone afterwards."""
    port = str(free_port())
    env = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *words],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def by_torchrun(words: Sequence[str], *, options: Sequence[str], agents: int = 1) -> Iterator[list[subprocess.Popen[str]]]:
    """`torchrun OPTIONS -m WORDS`, as often as there are nodes; deaf to SIGUSR1, as job files start it. All are gone afterwards."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--max-restarts", "3", *options, "-m", *words]
    processes = [
        subprocess.Popen(
            ["bash", "-c", 'trap "" USR1; exec "$@"', "bash", *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for _ in range(agents)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def endings(processes: Sequence[subprocess.Popen[str]], *, within_s: float = 400.0) -> list[tuple[int, str]]:
    """(exit code, stderr) of each process, once it has ended by itself."""
    found = []
    for process in processes:
        _, errors = process.communicate(timeout=within_s)
        found.append((process.returncode, errors))
    return found


def await_beat(run_dir: Path, rank: int, *, step: int, incarnation: int = 1, within_s: float = 400.0) -> Beat:
    """A rank's heartbeat once it has come to a step and is within one, not between two (saving)."""

    def look() -> Beat | None:
        beat = read_beat(RecoveryFolder.of_run(run_dir), rank)
        arrived = beat is not None and beat.incarnation >= incarnation and beat.step >= step and beat.phase in STEP_PHASES
        return beat if arrived else None

    return until(look, within_s=within_s)


def until(look: Callable[[], T | None], *, within_s: float) -> T:
    """What `look` finds, when it finds something."""
    deadline = time.monotonic() + within_s
    while (found := look()) is None:
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.05)
    return found


def send(beat: Beat, number: signal.Signals) -> float:
    """Send a rank's process a signal; when."""
    os.kill(beat.pid, number)
    return time.time()


def total(run_dir: Path) -> dict[str, float]:
    """What the loop has saved."""
    state: dict[str, float] = json.loads((run_dir / "state.json").read_text())
    return state

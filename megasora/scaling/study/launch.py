"""A run of a point on this machine: torchrun, its log, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megasora.scaling.study.grid import Point
from megasora.scaling.study.outcome import Ended

GRACE_S = 10.0
"""How long ranks that are told to end may take."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run of a point."""

    point: Point
    repeat: int
    """From 1."""
    flags: tuple[str, ...]
    """How its settings differ from the recipe's, without --run_dir."""
    folder: Path
    """Its own: run/, log.txt, outcome.json."""

    @property
    def run_dir(self) -> Path:
        """Folder of the training run."""
        return self.folder / "run"

    @property
    def log(self) -> Path:
        """All that its ranks say."""
        return self.folder / "log.txt"


class Handle(Protocol):
    """A run that goes on."""

    def poll(self) -> Ended | None:
        """How it ended; None while it goes on."""

    def interrupted(self) -> None:
        """The study is interrupted."""


class Launcher(Protocol):
    """What starts runs."""

    at_once: int
    """Runs at the same time."""
    poll_s: float
    """Seconds between two looks."""

    def command(self, task: Task) -> list[str]:
        """The words of the run, for the record."""

    def start(self, task: Task) -> Handle:
        """Start it; its folder is there and empty, or holds what an interrupted study left of it."""


class LocalLauncher:
    """Runs on this machine, one after the other.

    Args:
        recipe: what `megasora train` is given.
        timeout_s: longest time of a run.
        environment: variables besides this process's.
    """

    at_once = 1
    poll_s = 0.2

    def __init__(self, recipe: str, *, timeout_s: float, environment: Mapping[str, str]) -> None:
        self.recipe, self.timeout_s = recipe, timeout_s
        self.environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}

    def command(self, task: Task) -> list[str]:
        """torchrun, or the command alone for one rank."""
        return ["megasora", "train", self.recipe, *task.flags, "--run_dir", str(task.run_dir)]

    def start(self, task: Task) -> Handle:
        """Start the ranks, in a session of their own."""
        ranks = task.point.gpus
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        words = [sys.executable, *torchrun, "-m", *self.command(task)]
        own = {**os.environ, **self.environment}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):
            own.pop(name, None)  # of the job that the study itself may run in
        with task.log.open("w") as log:
            process = subprocess.Popen(
                words, env=own, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
        return _Process(process, timeout_s=self.timeout_s)


class _Process:
    def __init__(self, process: subprocess.Popen[bytes], *, timeout_s: float) -> None:
        self.process, self.timeout_s, self.started = process, timeout_s, time.monotonic()

    def poll(self) -> Ended | None:
        """Its end; past the limit it is ended."""
        code = self.process.poll()
        if code is not None:
            return Ended(code=code)
        if time.monotonic() - self.started > self.timeout_s:
            self._end()
            return Ended(code=-1, timed_out=True, said=f"it took longer than timeout_s ({self.timeout_s:g})")
        return None

    def interrupted(self) -> None:
        """End the ranks."""
        self._end()

    def _end(self) -> None:
        """The launcher first, which ends its ranks; then all that is left of the session it leads."""
        for number in (signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=GRACE_S)


def words_of(environment: Mapping[str, object]) -> dict[str, str]:
    """Variables as text: YAML reads 1 as a number."""
    return {str(name): str(value) for name, value in environment.items()}


def shown(words: Sequence[str], ranks: int) -> str:
    """The command as a person would type it."""
    import shlex

    before = ["torchrun", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    return shlex.join([*before, *words])

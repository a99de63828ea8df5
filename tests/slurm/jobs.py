"""Job files as `megasora slurm render` writes them, submitted to a cluster and watched."""

from __future__ import annotations

import json
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from megasora import cli
from megasora.checkpoint import store
from megasora.cli.parsing import parse
from megasora.config.schema import RunConfig
from tests.slurm.cluster import Cluster

STEPS = 40
SETTINGS = shlex.split(
    "--device cpu --model.num_double_blocks 2 --model.num_single_blocks 2 --model.hidden_size 64 --model.ffn_hidden_size 256 "
    "--model.axes_dim 2 2 4 --data.global_tokens 300 --evaluation.interval_steps 0 --checkpoint.interval_steps 0 --train.no_tensorboard"
)
CURVE = 1e-4
"""Relative; layouts add up in another order."""
PATIENCE_S = 240
"""A machine with other work may be many times slower than the 20 seconds that things take."""


def settings_of(flags: list[str]) -> RunConfig:
    """The tiny recipe with flags."""
    _, args = parse(["train", "tiny", *flags])
    config: RunConfig = args.config
    return config


class Jobs:
    """Jobs of one test.

    Args:
        cluster: where they run.
        folder: of the job file, its log and the run.
        straight: the run to compare with.
        variables: environment of the jobs.
    """

    def __init__(self, cluster: Cluster, *, folder: Path, straight: Path, variables: dict[str, str]) -> None:
        self.cluster, self.folder, self.straight, self.variables = cluster, folder, straight, variables
        self.run_dir = folder / "run"
        self.numbers: list[int] = []

    def start(self, *flags: str, nodes: int = 1, ranks_per_node: int = 1, render: tuple[str, ...] = (), **variables: str) -> int:
        """Render a file and submit it; `flags` go to megasora train."""
        file = self.folder / "job.sbatch"
        words = ["slurm", "render", "tiny", "--nodes", str(nodes), "--gpus_per_node", str(ranks_per_node), "--cpus_per_gpu", "1"]
        cli.main([*words, "--run_dir", str(self.run_dir), "--output", str(file), *render, *SETTINGS, "--train.steps", str(STEPS)])
        number = self.cluster.submit(file, *flags, options=("--output=%j.log",), **{**self.variables, **variables})
        self.numbers.append(number)
        return number

    def log(self, number: int) -> str:
        """What a job has printed, over all its attempts."""
        path = self.folder / f"{number}.log"
        return path.read_text() if path.exists() else ""

    def metrics(self) -> list[dict[str, Any]]:
        """The run's steps so far."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait(self, there: Callable[[], Any], what: str, *, seconds: float = PATIENCE_S) -> float:
        """Wait until it is; returns the seconds it took.

        Raises:
            AssertionError: it does not come.
        """
        started = time.monotonic()
        while not there():
            assert time.monotonic() - started < seconds, f"{what} did not come in {seconds} s"
            time.sleep(0.1)
        return time.monotonic() - started

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has done a step."""
        self.wait(lambda: any(record["step"] >= step for record in self.metrics()), f"step {step}")

    def wait_for_checkpoint(self) -> None:
        """Wait until a checkpoint is complete; a step that asked for one may be over before."""
        self.wait(lambda: store.complete_checkpoints(self.run_dir / "checkpoints"), "a checkpoint")

    def wait_for_state(self, number: int, *states: str) -> dict[str, str]:
        """Wait until a job is in one of some states."""
        self.wait(lambda: self.cluster.job(number)["JobState"] in states, f"state {' or '.join(states)} of job {number}")
        return self.cluster.job(number)

    def kill_a_rank(self) -> None:
        """kill -9 of one training process of this run."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if {"megasora", "train", str(self.run_dir)} <= set(words) and "python" in words[0] and "torchrun" not in words[1]:
                process.send_signal(signal.SIGKILL)
                return
        raise AssertionError("no rank is running")

    def assert_straight(self) -> None:
        """The run is complete, every step once, on the curve of the uninterrupted run."""
        expected = [json.loads(line) for line in (self.straight / "metrics.jsonl").read_text().splitlines()]
        found = self.metrics()
        assert [record["step"] for record in found] == list(range(1, STEPS + 1))
        for one, other in zip(expected, found, strict=True):
            assert abs(other["loss"] / one["loss"] - 1) < CURVE, (one["step"], one["loss"], other["loss"])
        assert store.complete_checkpoints(self.run_dir / "checkpoints")[-1].step == STEPS

    def restarts_from(self) -> list[int]:
        """Steps at which attempts took up the run."""
        return [event["step"] for record in self.metrics() for event in record["events"] if event["event"] == "restart"]

    def close(self) -> None:
        """End what still runs; print the logs, for a test that failed."""
        for number in self.numbers:
            if self.cluster.job(number)["JobState"] in ("RUNNING", "PENDING", "COMPLETING", "SUSPENDED"):
                self.cluster.ask("scancel", str(number))
            print(f"--- job {number}: {self.cluster.job(number)}\n{self.log(number)}")
        self.wait(lambda: not self.cluster.ask("squeue", "-h"), "an empty queue")

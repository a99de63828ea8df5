"""`megasora train` survives: killed and stopped ranks come back, under `supervise` and torchrun, and no loss changes by it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megasora.checkpoint import store
from megasora.config.io import save_yaml
from megasora.config.schema import ParallelConfig, RecoveryConfig, RunConfig
from megasora.recovery.folder import RecoveryFolder
from megasora.recovery.report import examine
from megasora.recovery.watchdog import HANG_EXIT_CODE
from tests.parallel.runs import metrics, tiny_run, train_on_rank
from tests.pool import RankPool
from tests.recovery.worlds import ROOT, await_beat, by_torchrun, endings, free_port, send, started, until

STEPS = 24
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run_of(run_dir: Path) -> RunConfig:
    config = tiny_run(run_dir, steps=STEPS, parallel=ParallelConfig(), interval_steps=5)
    return replace(config, recovery=RecoveryConfig(hang_floor_s=15.0, report_interval_steps=10))


@pytest.fixture(scope="module")
def alone(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Assets and losses of a run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    config = run_of(run_dir)
    pool.run(2, train_on_rank, replace(config, recovery=replace(config.recovery, watchdog=False)))
    return run_dir / "assets", losses(run_dir)


Alone = tuple[Path, list[float]]


def new_run(folder: Path, alone: Alone) -> Path:
    """Folder of a run that has its assets."""
    run_dir = folder / "run"
    run_dir.mkdir()
    (run_dir / "assets").symlink_to(alone[0])
    save_yaml(run_of(run_dir), folder / "given.yaml")
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path, alone: Alone) -> Path:
    """The same, for one test."""
    return new_run(tmp_path, alone)


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics(run_dir)]


def words(run_dir: Path) -> list[str]:
    return ["train", str(run_dir.parent / "given.yaml")]


def doctor(run_dir: Path) -> dict[str, Any]:
    """What `megasora doctor --run` says, without a process that has to import torch."""
    saved = max(entry.step for entry in store.complete_checkpoints(run_dir / "checkpoints"))
    data: dict[str, Any] = json.loads(json.dumps(examine(run_dir, saved_step=saved).data()))
    return data


def found(path: Path) -> Callable[[], Path | None]:
    return lambda: path if path.exists() else None


def test_a_killed_and_a_stopped_rank_cost_no_more_than_time(run_dir: Path, alone: Alone) -> None:
    folder = RecoveryFolder.of_run(run_dir)
    with started(["megasora", "supervise", "--backoff_s", "1", "--", *words(run_dir)]) as world:
        send(await_beat(run_dir, 1, step=6), signal.SIGKILL)
        stopped = send(await_beat(run_dir, 1, step=11, incarnation=2), signal.SIGSTOP)
        hang = until(found(folder.hang(2)), within_s=90)
        waited = hang.stat().st_mtime - stopped
        ends = endings(world, within_s=400)
    assert [code for code, _ in ends] == [0, 0], ends
    assert losses(run_dir) == alone[1]
    assert waited < 30
    stacks = folder.stacks(2, 0).read_text()  # it waited for rank 1 in a message of a step, whichever
    assert "training/trainer.py" in stacks
    assert "distributed/distributed_c10d.py" in stacks or "autograd" in stacks
    answer = subprocess.run(
        [sys.executable, "-m", "megasora", "doctor", "--run", str(run_dir), "--json"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    report = json.loads(answer.stdout)
    assert report["cause"]["kind"] == "finished"
    assert [(cause["kind"], cause["rank"]) for cause in report["earlier"]] == [("killed", 1), ("hang", 1)]
    assert report["earlier"][0]["what"] == "ended by SIGKILL"
    assert report["earlier"][1]["stackless"] == [1]
    assert report["goodput"]["incarnations"] == 3
    assert report["goodput"]["restarts_s"] > waited


@pytest.fixture(scope="module")
def torchrun_life(alone: Alone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under torchrun that lost a rank, came back, and was told to end as `scancel --signal=USR1` does: every process is told."""
    run_dir = new_run(tmp_path_factory.mktemp("torchrun"), alone)
    options = ["--nproc-per-node", "2", "--master-port", str(free_port())]
    with by_torchrun(["megasora", *words(run_dir)], options=options) as agents:
        send(await_beat(run_dir, 1, step=6), signal.SIGKILL)
        await_beat(run_dir, 1, step=8, incarnation=2)
        for pid in (agents[0].pid, *(await_beat(run_dir, rank, step=8, incarnation=2).pid for rank in (0, 1))):
            os.kill(pid, signal.SIGUSR1)
        ((code, errors),) = endings(agents, within_s=400)
    assert code == 0, errors
    return run_dir


def test_torchrun_brings_a_killed_rank_back(torchrun_life: Path, alone: Alone) -> None:
    reached = losses(torchrun_life)
    assert reached == alone[1][: len(reached)]
    (killed,) = doctor(torchrun_life)["earlier"]
    assert (killed["kind"], killed["rank"], killed["secondary"]) == ("killed", 1, 1)
    assert "left no record" in killed["what"]


def test_a_signal_under_torchrun_saves_and_ends_the_run(torchrun_life: Path) -> None:
    assert_stopped(torchrun_life, by="SIGUSR1")


def test_a_signal_to_the_supervisor_saves_and_ends_the_run(torchrun_life: Path, alone: Alone) -> None:
    """The same run goes on, alone."""
    before = len(losses(torchrun_life))
    with started(["megasora", "supervise", "--", *words(torchrun_life)], ranks=1) as world:
        await_beat(torchrun_life, 0, step=before + 2, incarnation=3)
        world[0].send_signal(signal.SIGTERM)
        ((code, errors),) = endings(world)
    assert code == 0, errors
    assert len(losses(torchrun_life)) > before
    assert_stopped(torchrun_life, by="SIGTERM")


def assert_stopped(run_dir: Path, *, by: str) -> None:
    """Its last step is saved, and what is said of its end."""
    last = metrics(run_dir)[-1]
    assert last["step"] < STEPS
    told = [event for event in last["events"] if event["event"] in ("checkpoint", "stop")]
    assert [event["event"] for event in told][-2:] == ["checkpoint", "stop"]  # before them, at times, an earlier save that ended just now
    assert told[-2]["path"] == f"step_{last['step']:08d}"
    report = doctor(run_dir)
    assert (report["cause"]["kind"], report["cause"]["what"]) == ("stopped", f"asked to stop by {by}")
    assert report["saved_step"] == last["step"]
    assert report["lost_steps"] == 0


def test_a_save_that_hangs_ends_the_run_with_its_stacks(run_dir: Path) -> None:
    with started(["tests.recovery.stuck_save", *words(run_dir), "--recovery.save_s", "8"]) as world:
        ends = endings(world, within_s=400)
    assert [code for code, _ in ends] == [HANG_EXIT_CODE] * 2, ends
    report = doctor(run_dir)
    assert (report["cause"]["kind"], report["cause"]["rank"]) == ("hang", 1)
    assert "a checkpoint was being written for" in report["cause"]["what"]
    assert "write_rank_file" in RecoveryFolder.of_run(run_dir).stacks(1, 1).read_text()
    assert report["saved_step"] == 5


def test_a_mistake_is_said_once_and_not_restarted(run_dir: Path) -> None:
    wrong = [*words(run_dir), "--parallel.tensor_model_parallel_size", "3"]
    began = time.monotonic()
    with started(["megasora", "supervise", "--backoff_s", "600", "--", *wrong]) as world:
        ends = endings(world)
    assert [code for code, _ in ends] == [2, 2], ends
    assert sum(errors.count("megasora: error:") for _, errors in ends) == 1
    assert time.monotonic() - began < 600

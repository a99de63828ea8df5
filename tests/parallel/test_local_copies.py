"""Copies on the nodes' own disks: the newest that every rank has whole is what a run goes on from, to the bit, or all leave it together."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megasora.checkpoint import local_copies, manifests, store
from megasora.config.schema import ParallelConfig, PrecisionConfig, RunConfig
from megasora.training import diffusion
from tests.parallel.runs import metrics, tiny_run, train_on_rank
from tests.parallel.test_parity import layout
from tests.pool import RankPool

STEPS = 10
SAVED, COPIED, KILLED = 4, 6, 7
"""The last checkpoint, a newer copy, and the step after which nothing more happens."""


def config_of(folder: Path, parallel: ParallelConfig, **changes: Any) -> RunConfig:
    """A run in a folder, with copies in the same one."""
    config = tiny_run(folder / "run", steps=STEPS, parallel=parallel, interval_steps=SAVED, **changes)
    # without threads, so that at the end of a step its copy is there
    settings = replace(config.checkpoint, local_dir=str(folder / "disks"), local_interval_steps=2, asynchronous=False)
    return replace(config, checkpoint=settings)


def trains(rank: int, config: RunConfig, until: int) -> None:
    """A run whose every rank is a node, and that stands still after a step."""
    real_node, real_step = local_copies.node_name, diffusion.train_step

    def step(trainee: Any, *arguments: Any, **options: Any) -> Any:
        if trainee.step == until:
            time.sleep(600)
        return real_step(trainee, *arguments, **options)

    local_copies.node_name, diffusion.train_step = lambda: f"node{rank}", step
    try:
        train_on_rank(rank, config)
    finally:
        local_copies.node_name, diffusion.train_step = real_node, real_step


def copies(folder: Path, node: int) -> list[int]:
    """Steps of a node's whole copies."""
    return [entry.step for disk in (folder / "disks").glob(f"*/node{node}") for entry in store.complete_checkpoints(disk)]


def kill(pool: RankPool, world_size: int, config: RunConfig, folder: Path) -> None:
    """Train until there is a copy that is newer than the checkpoint, and send SIGKILL."""

    def there() -> bool:
        file = folder / "run" / "metrics.jsonl"
        return file.exists() and f'"step": {KILLED},' in file.read_text()

    assert pool.run_and_kill(world_size, trains, config, KILLED, victim=0, when=there)
    assert all(COPIED in copies(folder, node) for node in range(world_size))
    assert [entry.step for entry in store.complete_checkpoints(folder / "run" / "checkpoints")] == [SAVED]


def restart_of(folder: Path) -> dict[str, Any]:
    """The run's only restart."""
    (event,) = [event for record in metrics(folder / "run") for event in record["events"] if event["event"] == "restart"]
    found: dict[str, Any] = event
    return found


def result_of(run_dir: Path) -> tuple[list[tuple[float, float]], dict[str, str]]:
    """Every step's loss and gradient norm, and the hash of every rank's last state."""
    files = manifests.read(store.step_folder(run_dir / "checkpoints", STEPS))["files"]
    curve = [(record["loss"], record["grad_norm"]) for record in metrics(run_dir)]
    return curve, {name: facts["sha256"] for name, facts in files.items() if name.endswith(".distcp")}


@pytest.fixture(scope="module")
def assets(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips and encoders that all runs share."""
    run_dir = tmp_path_factory.mktemp("first") / "run"
    pool.run(1, train_on_rank, tiny_run(run_dir, steps=1, parallel=ParallelConfig()))
    return run_dir / "assets"


def with_assets(folder: Path, assets: Path) -> Path:
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "assets").symlink_to(assets)
    return folder


@pytest.fixture(scope="module")
def killed(pool: RankPool, assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two nodes that was killed."""
    folder = with_assets(tmp_path_factory.mktemp("killed") / "one", assets)
    kill(pool, 2, config_of(folder, ParallelConfig()), folder)
    return folder


@pytest.fixture
def again(killed: Path, tmp_path: Path) -> Path:
    """The same, for one test."""
    return shutil.copytree(killed, tmp_path / "again", symlinks=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "parallel", "precision"),
    [
        (2, layout(), PrecisionConfig()),
        (4, layout(tp=2, pp=2), PrecisionConfig(dtype="bf16")),
        (2, replace(layout(), zero_stage=3), PrecisionConfig(dtype="bf16")),
    ],
    ids=["dp2", "tp2 pp2 bf16", "zero3 bf16"],
)
def test_a_killed_run_goes_on_from_its_copies_to_the_bit(
    pool: RankPool, assets: Path, tmp_path: Path, world_size: int, parallel: ParallelConfig, precision: PrecisionConfig
) -> None:
    killed, straight = with_assets(tmp_path / "killed", assets), with_assets(tmp_path / "straight", assets)
    config = config_of(killed, parallel, precision=precision)
    kill(pool, world_size, config, killed)
    pool.run(world_size, trains, config, -1)
    assert (restart_of(killed)["step"], restart_of(killed)["note"]) == (COPIED, "resumed from the copies on the nodes")
    pool.run(world_size, train_on_rank, tiny_run(straight / "run", steps=STEPS, parallel=parallel, precision=precision))
    assert result_of(killed / "run") == result_of(straight / "run")


def lost(folder: Path) -> None:
    """A node comes back with an empty disk."""
    (disk,) = (folder / "disks").glob("*/node1")
    shutil.rmtree(disk)


def flipped(folder: Path) -> None:
    """A bit of a rank's copy is another."""
    (path,) = (folder / "disks").glob(f"*/node1/step_{COPIED:08d}/__1_0.distcp")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def of_another_save(folder: Path) -> None:
    """A node has the step's copy of another past of the run."""
    (path,) = (folder / "disks").glob(f"*/node1/step_{COPIED:08d}/{manifests.NAME}")
    manifest = {name: value for name, value in json.loads(path.read_text()).items() if name != manifests.SEAL}
    manifest["state"]["copy"]["number"] += 1
    path.write_text(json.dumps(manifests.sealed(manifest)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("happens", "said"),
    [(lost, "rank 1 has no part of it"), (flipped, "on node1 __1_0.distcp has another SHA-256"), (of_another_save, "rank 1 has no part")],
)
def test_what_one_rank_lacks_all_leave_together(
    pool: RankPool, again: Path, killed: Path, happens: Callable[[Path], None], said: str
) -> None:
    happens(again)
    pool.run(2, trains, config_of(again, ParallelConfig()), -1)
    restart = restart_of(again)
    assert (restart["step"], restart["note"]) == (SAVED, "resumed")
    assert said in restart["local"]
    assert metrics(again / "run")[SAVED]["loss"] == metrics(killed / "run")[SAVED]["loss"]


@pytest.mark.slow
def test_another_layout_goes_on_from_the_checkpoint(pool: RankPool, again: Path) -> None:
    pool.run(2, trains, config_of(again, layout(tp=2)), -1)
    assert restart_of(again)["step"] == SAVED
    assert "in this layout" in restart_of(again)["local"]


@pytest.mark.slow
def test_copies_do_not_outlive_their_run(pool: RankPool, again: Path) -> None:
    """The run's folder was removed and the same command begins anew."""
    config = config_of(again, ParallelConfig())
    pool.run(2, trains, replace(config, train=replace(config.train, steps=COPIED)), -1)  # the disks are this folder's from now on
    before = set((again / "disks").iterdir())
    shutil.rmtree(again / "run" / "checkpoints")
    pool.run(2, trains, config, -1)
    events = [event["event"] for record in metrics(again / "run") for event in record["events"]]
    assert "restart" not in events and "local_checkpoint" in events
    assert [record["step"] for record in metrics(again / "run")] == list(range(1, STEPS + 1))
    assert before.isdisjoint((again / "disks").iterdir())


@pytest.mark.slow
def test_a_disk_that_cannot_be_written_costs_the_copies(pool: RankPool, assets: Path, tmp_path: Path) -> None:
    folder = with_assets(tmp_path, assets)
    (folder / "disks").write_text("no folder")
    pool.run(2, trains, config_of(folder, ParallelConfig()), -1)
    events = [event for record in metrics(folder / "run") for event in record["events"]]
    assert [event["event"] for event in events] == ["local_off", "checkpoint", "checkpoint", "checkpoint"]
    assert "node0" in events[0]["reason"]

"""A run whose data have changed goes on only as it was told to, and says so."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megasora.checkpoint import store
from megasora.config.schema import ParallelConfig, RunConfig
from megasora.training import feed
from megasora.training.guard import LeftOut, read_left_out
from tests.parallel.runs import metrics, tiny_run, train_on_rank
from tests.pool import RankFailedError, RankPool

STEPS = 2
"""Within the first epoch."""


def run_of(run_dir: Path, *, steps: int, budget: int = 300, resume_data: str = "exact") -> RunConfig:
    config = tiny_run(run_dir, steps=steps, parallel=ParallelConfig(), data={"global_tokens": budget})
    return replace(config, resume_data=resume_data)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def first(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in the middle of its first epoch."""
    run_dir = tmp_path_factory.mktemp("first") / "run"
    pool.run(1, train_on_rank, run_of(run_dir, steps=STEPS))
    return run_dir


@pytest.fixture
def run_dir(first: Path, tmp_path: Path) -> Path:
    shutil.copytree(first, tmp_path / "run")
    return tmp_path / "run"


def sampler(run_dir: Path, step: int) -> tuple[int, int]:
    state = store.read_manifest(store.step_folder(run_dir / "checkpoints", step))["state"]["sampler"]
    return state["epoch"], state["consumed"]


def test_another_budget_is_refused_with_the_choices(pool: RankPool, run_dir: Path) -> None:
    with pytest.raises(RankFailedError, match=r"another global_tokens \(300\) than this run \(400\).*--resume_data epoch \(or restart\)"):
        pool.run(1, train_on_rank, run_of(run_dir, steps=4, budget=400))


@pytest.mark.parametrize(("choice", "epoch"), [("epoch", 1), ("restart", 0)])
def test_the_sampler_begins_where_the_run_says(pool: RankPool, run_dir: Path, choice: str, epoch: int) -> None:
    """And the run that is stopped after that goes on exactly, although it still says so."""
    assert sampler(run_dir, STEPS)[1] > 0
    straight = run_dir.parent / "straight"
    shutil.copytree(run_dir, straight)
    pool.run(1, train_on_rank, run_of(straight, steps=4, budget=400, resume_data=choice))
    (event,) = [event for event in metrics(straight)[STEPS]["events"] if event["event"] == "restart"]
    assert event["data"] == f"epoch {epoch} begins, for another global_tokens"
    assert sampler(straight, 4)[0] == epoch
    for steps in (3, 4):
        pool.run(1, train_on_rank, run_of(run_dir, steps=steps, budget=400, resume_data=choice))
    assert [record["loss"] for record in metrics(run_dir)] == [record["loss"] for record in metrics(straight)]
    assert sampler(run_dir, 4) == sampler(straight, 4)


def train_with_bad_steps(rank: int, config: RunConfig) -> None:
    """A run whose second and third steps have tokens that are no numbers, whenever they come."""
    met: list[int] = []
    draw = feed.Feeder._draw

    def spoilt(feeder: Any, planned: Any, place: int, material: Any) -> dict[str, Tensor]:
        drawn = draw(feeder, planned, place, material)
        at = planned.plan.position.consumed
        if at not in met:
            met.append(at)
        return {**drawn, "tokens": drawn["tokens"] * torch.nan} if at in met[1:3] else drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed.Feeder, "_draw", spoilt)
        train_on_rank(rank, config)


@pytest.mark.parametrize("choice", ["epoch", "restart"])
def test_going_back_to_other_data_passes_over_what_was_left_out_of_these(pool: RankPool, run_dir: Path, choice: str) -> None:
    """Two bad steps before the first checkpoint with the new data: the run meets them once, not until its budget is used up."""
    pool.run(1, train_with_bad_steps, run_of(run_dir, steps=4, budget=400, resume_data=choice))
    records = metrics(run_dir)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    happened = [event for record in records for event in record["events"]]
    assert [event["to"] for event in happened if event["event"] == "go_back"] == [f"step_{STEPS:08d}"]
    (file,) = (run_dir / "recovery").glob("left_out_*.jsonl")
    entries = read_left_out(file)
    assert len(entries) == 3
    assert entries[2].position.consumed == 0  # the step before the two
    kept = store.read_manifest(store.step_folder(run_dir / "checkpoints", 4))["state"]["guard"]["left_out"]
    assert [LeftOut.of(record) for record in kept] == entries


def test_what_has_not_changed_goes_on_exactly(pool: RankPool, first: Path, run_dir: Path) -> None:
    twin = run_dir.parent / "twin"
    shutil.copytree(first, twin)
    for folder, choice in ((run_dir, "restart"), (twin, "exact")):
        pool.run(1, train_on_rank, run_of(folder, steps=4, resume_data=choice))
    assert [record["loss"] for record in metrics(run_dir)] == [record["loss"] for record in metrics(twin)]

"""Bad steps in whole runs: left out or gone back from, and then the run that never had their samples."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megasora.checkpoint import store
from megasora.checkpoint.source import open_source
from megasora.config.schema import GuardConfig, ParallelConfig, RunConfig
from megasora.training import feed, step
from megasora.training.guard import LeftOut, append_left_out, read_left_out
from tests.parallel.runs import metrics, tiny_run, train_on_rank
from tests.pool import RankFailedError, RankPool

STEPS = 8
TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)


def run_of(run_dir: Path, *, assets: Path, layout: ParallelConfig | None = None, **guard: Any) -> RunConfig:
    if not run_dir.exists():
        shutil.copytree(assets, run_dir / "assets")
    config = tiny_run(run_dir, steps=STEPS, parallel=layout or ParallelConfig(), interval_steps=2)
    return replace(config, guard=GuardConfig(**{"window": 4, **guard}))


@pytest.fixture(scope="module")
def assets(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips and encoders that all runs share."""
    run_dir = tmp_path_factory.mktemp("first") / "run"
    pool.run(1, train_on_rank, tiny_run(run_dir, steps=1, parallel=ParallelConfig()))
    return run_dir / "assets"


def train_with(rank: int, config: RunConfig, scales: dict[int, float]) -> None:
    """A run whose steps at these positions of the first epoch get tokens that are so many times too large."""
    real = feed.Feeder._draw

    def draw(feeder: Any, planned: Any, place: int, material: Any) -> dict[str, Tensor]:
        drawn = real(feeder, planned, place, material)
        position = planned.plan.position
        scale = scales.get(position.consumed, 1.0) if position.epoch == 0 else 1.0
        return drawn if scale == 1.0 else {**drawn, "tokens": drawn["tokens"] * scale}

    feed.Feeder._draw = draw  # type: ignore[method-assign]
    try:
        train_on_rank(rank, config)
    finally:
        feed.Feeder._draw = real  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def begins(pool: RankPool, assets: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Where the steps of an undisturbed run begin in its first epoch."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    config = run_of(run_dir, assets=assets)
    pool.run(1, train_on_rank, replace(config, checkpoint=replace(config.checkpoint, interval_steps=1, keep=0)))
    folders = [store.step_folder(run_dir / "checkpoints", k) for k in range(1, STEPS + 1)]
    states = [store.read_manifest(folder)["state"]["sampler"] for folder in folders]
    return [0, *(state["consumed"] for state in states if state["epoch"] == 0)]


def curve(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in metrics(run_dir)]


def events_of(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [event for record in metrics(run_dir) for event in record["events"] if event["event"] == name]


def left_out(run_dir: Path) -> list[LeftOut]:
    return [entry for file in (run_dir / "recovery").glob("left_out_*.jsonl") for entry in read_left_out(file)]


def same_without_them(pool: RankPool, run_dir: Path, assets: Path) -> None:
    """The run equals, to the bit, one that was told from the start to pass over what this one left out."""
    never = run_of(run_dir.parent / "never", assets=assets)
    (file,) = (run_dir / "recovery").glob("left_out_*.jsonl")
    append_left_out(Path(str(never.run_dir)) / "recovery" / file.name, left_out(run_dir))
    pool.run(1, train_on_rank, never)
    assert curve(run_dir) == curve(Path(str(never.run_dir)))
    one, other = (open_source(store.step_folder(Path(folder) / "checkpoints", STEPS), select="ema") for folder in (run_dir, never.run_dir))
    assert all(torch.equal(one.read(key), other.read(key)) for key in one.shapes)


@pytest.fixture(scope="module")
def spiked(pool: RankPool, assets: Path, begins: list[int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank whose fifth step has tokens that are too large."""
    run_dir = tmp_path_factory.mktemp("spiked") / "run"
    pool.run(1, train_with, run_of(run_dir, assets=assets), {begins[4]: 1e4})
    return run_dir


@pytest.mark.parametrize("scale", [1e4, float("nan")], ids=["spike", "not a number"])
def test_a_planted_bad_step_leaves_the_run_that_never_had_it(
    pool: RankPool, assets: Path, begins: list[int], spiked: Path, tmp_path: Path, scale: float
) -> None:
    run_dir, bad = spiked, begins[4]
    if scale != 1e4:
        run_dir = tmp_path / "run"
        pool.run(1, train_with, run_of(run_dir, assets=assets), {bad: scale})
    (found,) = left_out(run_dir)
    assert (found.position.epoch, found.position.consumed, found.step) == (0, bad, 5)
    (event,) = events_of(run_dir, "left_out")
    assert event["step"] == 5
    assert event["samples"] >= len(event["clips"]) >= 1
    assert [number for number, _, _ in curve(run_dir)] == list(range(1, STEPS + 1))
    same_without_them(pool, run_dir, assets)


def test_two_bad_steps_in_a_row_go_back_to_the_newest_checkpoint(pool: RankPool, assets: Path, begins: list[int], tmp_path: Path) -> None:
    """And pass over the step before them too, which may have spoilt the weights: steps 4 and 5 are bad, the checkpoint is at 2.

    ZeRO-2 keeps parameters gathered after a step that did not happen, which is where a run goes back from.
    """
    at = begins
    for name, ranks, layout in (("run", 1, None), ("zero2", 2, ParallelConfig(zero_stage=2))):
        pool.run(ranks, train_with, run_of(tmp_path / name, assets=assets, layout=layout), {at[3]: 1e4, at[4]: 1e4})
        assert [entry.position.consumed for entry in left_out(tmp_path / name)] == [at[3], at[4], at[2]]
        (event,) = events_of(tmp_path / name, "go_back")
        assert (event["from_step"], event["to"]) == (3, "step_00000002")
        assert [number for number, _, _ in curve(tmp_path / name)] == list(range(1, STEPS + 1))
    assert [loss for _, loss, _ in curve(tmp_path / "zero2")] == pytest.approx([loss for _, loss, _ in curve(tmp_path / "run")], rel=1e-4)
    same_without_them(pool, tmp_path / "run", assets)


def test_all_layouts_leave_out_the_same(pool: RankPool, assets: Path, begins: list[int], spiked: Path, tmp_path: Path) -> None:
    bad = begins[4]
    found = []
    for name, world_size, layout in (("dp3", 3, None), ("tp2 pp2", 4, TP2_PP2)):
        pool.run(world_size, train_with, run_of(tmp_path / name, assets=assets, layout=layout), {bad: 1e4})
        found.append([(entry.position, entry.step) for entry in left_out(tmp_path / name)])
    assert found == [[(entry.position, entry.step) for entry in left_out(spiked)]] * 2
    alone = curve(spiked)
    for name in ("dp3", "tp2 pp2"):
        for (_, loss, _), (_, expected, _) in zip(curve(tmp_path / name), alone, strict=True):
            assert loss == pytest.approx(expected, rel=1e-4)


def train_with_a_poisoned_rank(rank: int, config: RunConfig) -> None:
    """Rank 1's gradients of the third step are not a number."""
    real: Callable[..., Any] = step.run_schedule
    calls = 0

    def schedule(wrapped: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        reports = real(wrapped, *args, **kwargs)
        calls += 1
        if rank == 1 and calls == 3:
            wrapped[0].buffers[0].grad_data.fill_(float("nan"))
        return reports

    step.run_schedule = schedule
    try:
        train_on_rank(rank, config)
    finally:
        step.run_schedule = real


def test_a_gradient_that_is_no_number_on_one_rank_stops_the_step_on_all(pool: RankPool, assets: Path, tmp_path: Path) -> None:
    pool.run(2, train_with_a_poisoned_rank, run_of(tmp_path / "run", assets=assets))
    (found,) = left_out(tmp_path / "run")
    assert (found.step, found.reason) == (3, "gradient norm is nan")
    assert len(curve(tmp_path / "run")) == STEPS


def test_a_restart_knows_what_was_left_out(pool: RankPool, assets: Path, begins: list[int], tmp_path: Path) -> None:
    """Also when it starts before it, from a checkpoint that had not seen it."""
    bad = begins[4]
    run_dir = tmp_path / "run"
    pool.run(1, train_with, run_of(run_dir, assets=assets), {bad: 1e4})
    straight = curve(run_dir)
    for folder in (run_dir / "checkpoints").glob("step_*"):
        if folder.name > "step_00000004":
            shutil.rmtree(folder)
    pool.run(1, train_on_rank, run_of(run_dir, assets=assets))
    assert curve(run_dir) == straight
    assert len(left_out(run_dir)) == 1


def test_the_run_ends_when_there_is_nothing_to_go_back_to(pool: RankPool, assets: Path, tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="no checkpoint to go back to"):
        pool.run(1, train_with, run_of(tmp_path / "run", assets=assets), {consumed: float("nan") for consumed in range(100)})

"""A stage starts from the run of the one before: its newest complete checkpoint, trained or averaged; a new condition input is zero."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megasora.checkpoint.export import export_weights
from megasora.checkpoint.source import Select, open_source
from megasora.config.schema import ConditionConfig, InitConfig, RunConfig
from tests.parallel.runs import metrics, tiny_run, train_on_rank
from tests.parallel.test_parity import layout
from tests.pool import RankFailedError, RankPool

STILL = {"lr": 1e-30, "warmup_steps": 0}
"""A rate that moves zeros by 1e-30 and nothing else in fp32, so that the first checkpoint holds what the run started from."""


def stage(run_dir: Path, *, cond_embed: bool, init: InitConfig = InitConfig(), optimizer: dict[str, Any] | None = None) -> RunConfig:  # noqa: B008
    config = tiny_run(run_dir, steps=1, parallel=layout(tp=2), optimizer=optimizer or {}, init=init)
    condition = ConditionConfig(t2v=1.0, i2v_head=1.0) if cond_embed else ConditionConfig()
    return replace(config, model=replace(config.model, cond_embed=cond_embed), condition=condition)


def weights(run_dir: Path, step: int, *, select: Select = "model") -> dict[str, Tensor]:
    source = open_source(run_dir / "checkpoints" / f"step_{step:08d}", select=select)
    return {key: source.read(key).clone() for key in source.shapes}


@pytest.fixture(scope="module")
def before(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps without a condition input, with checkpoints after each; the newest is cut off."""
    run_dir = tmp_path_factory.mktemp("before") / "run"
    config = stage(run_dir, cond_embed=False)
    config = replace(config, train=replace(config.train, steps=3), checkpoint=replace(config.checkpoint, interval_steps=1))
    pool.run(2, train_on_rank, config)
    next((run_dir / "checkpoints" / "step_00000003").glob("*.distcp")).write_bytes(b"")
    return run_dir


@pytest.mark.parametrize(("choice", "select"), [("auto", "ema"), ("ema", "ema"), ("model", "model")])
def test_a_stage_starts_from_the_newest_complete_checkpoint(
    pool: RankPool, before: Path, tmp_path: Path, choice: Any, select: Select
) -> None:
    init = InitConfig(run=str(before), run_weights=choice, follows="other")
    pool.run(2, train_on_rank, replace(stage(tmp_path / "run", cond_embed=True, init=init, optimizer=STILL), parallel=layout()))
    started, given = weights(tmp_path / "run", 1), weights(before, 2, select=select)
    new = set(started) - set(given)
    assert new == {"cond_in.weight", "cond_in.bias"}
    assert all(torch.allclose(started[key], given[key], rtol=0, atol=1e-20) for key in given)
    assert all(started[key].abs().max() < 1e-20 for key in new)
    trained, averaged = (weights(before, 2, select=kind) for kind in ("model", "ema"))  # type: ignore[arg-type]
    assert any(not torch.equal(trained[key], averaged[key]) for key in given)
    (event,) = [event for event in metrics(tmp_path / "run")[0]["events"] if event["event"] == "init"]
    assert event["weights"].endswith("step_00000002") and event["select"] == select
    assert event["notes"] == ["tiny follows other, this is a run of tiny", "cond_in starts at zero"]


def test_a_run_without_an_average_gives_its_trained_weights(pool: RankPool, tmp_path: Path) -> None:
    pool.run(1, train_on_rank, replace(stage(tmp_path / "a", cond_embed=True, optimizer={"ema_decay": 0.0}), parallel=layout()))
    init = InitConfig(run=str(tmp_path / "a"))
    pool.run(1, train_on_rank, replace(stage(tmp_path / "b", cond_embed=True, init=init, optimizer=STILL), parallel=layout()))
    started, given = weights(tmp_path / "b", 1), weights(tmp_path / "a", 1)
    assert all(torch.allclose(started[key], given[key], rtol=0, atol=1e-20) for key in given)
    wanted = replace(init, run_weights="ema")
    with pytest.raises(RankFailedError, match=r"holds none; use --init.run_weights model"):
        pool.run(1, train_on_rank, replace(stage(tmp_path / "c", cond_embed=True, init=wanted), parallel=layout()))


def test_a_folder_that_gives_no_weights_is_refused_with_the_cure(pool: RankPool, before: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    checkpoint = before / "checkpoints" / "step_00000002"
    other = replace(stage(tmp_path / "run", cond_embed=False, init=InitConfig(run=str(before))), parallel=layout())
    other = replace(other, model=replace(other.model, num_single_blocks=3))
    for init, message in (
        (InitConfig(run=str(tmp_path / "none")), r"none is no folder; give the run_dir of a run"),
        (InitConfig(run=str(tmp_path / "empty")), r"has no complete checkpoint in checkpoints/"),
        (InitConfig(run=str(checkpoint)), r"is a checkpoint, not the folder of a run: use --init.weights .*step_00000002"),
    ):
        with pytest.raises(RankFailedError, match=message):
            pool.run(1, train_on_rank, replace(other, model=stage(tmp_path, cond_embed=False).model, init=init))
    with pytest.raises(RankFailedError, match=r"are of another model: num_single_blocks 2 \(wanted 3\)"):
        pool.run(1, train_on_rank, other)
    with_condition = InitConfig(run=str(tmp_path / "cond"))
    trained = stage(tmp_path / "cond", cond_embed=True)  # before the first step the last layer is zero and lets no gradient through
    pool.run(1, train_on_rank, replace(trained, parallel=layout(), train=replace(trained.train, steps=3)))
    with pytest.raises(RankFailedError, match=r"are of another model: cond_embed True \(wanted False\)"):
        pool.run(1, train_on_rank, replace(stage(tmp_path / "run", cond_embed=False, init=with_condition), parallel=layout()))


def test_a_condition_input_of_zeros_may_be_left_out(pool: RankPool, before: Path, tmp_path: Path) -> None:
    """What `convert --init open-sora-v2` adds for a stage that takes conditions is nothing to one that takes none."""
    start = tmp_path / "start"
    export_weights(before / "checkpoints" / "step_00000002", start, target_format="opensora", init="open-sora-v2")
    config = stage(tmp_path / "run", cond_embed=False, init=InitConfig(weights=str(start)), optimizer=STILL)
    pool.run(1, train_on_rank, replace(config, parallel=layout()))
    (event,) = [event for event in metrics(tmp_path / "run")[0]["events"] if event["event"] == "init"]
    assert event["notes"] == ["cond_in, all zero, is dropped"]
    assert not any(key.startswith("cond_in") for key in weights(tmp_path / "run", 1))


def test_a_run_that_goes_on_ignores_what_it_started_from(pool: RankPool, before: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    shutil.copytree(before, earlier)
    init = InitConfig(run=str(earlier))
    config = replace(stage(tmp_path / "run", cond_embed=False, init=init), parallel=layout())
    pool.run(1, train_on_rank, config)
    shutil.rmtree(earlier)
    pool.run(1, train_on_rank, replace(config, train=replace(config.train, steps=2)))
    (event,) = [event for event in metrics(tmp_path / "run")[1]["events"] if event["event"] == "restart"]
    assert event["note"] == "resumed; --init.run is ignored"


def test_a_stage_that_follows_another_says_so_when_it_starts_from_nothing(pool: RankPool, tmp_path: Path) -> None:
    init = InitConfig(follows="opensora2_stage1")
    pool.run(1, train_on_rank, replace(stage(tmp_path / "run", cond_embed=True, init=init), parallel=layout()))
    (event,) = [event for event in metrics(tmp_path / "run")[0]["events"] if event["event"] == "init"]
    assert event["notes"] == ["tiny follows opensora2_stage1: --init.run FOLDER starts from that run's weights"]

"""Training steps against the published rules, read from the checkpoints of a run: AdamW, clipping, the schedule, EMA, and a resume."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megasora.checkpoint import store
from megasora.checkpoint.formats.canonical import canonical_shapes
from megasora.checkpoint.megatron_io import MegatronReader
from megasora.checkpoint.tensors import as_torch
from megasora.config.schema import GuardConfig, RunConfig
from megasora.models.mmdit.initialization import initial_values
from megasora.parallel.shards import Piece
from tests.parallel.runs import metrics, tiny_run, train_on_rank
from tests.parallel.test_parity import layout
from tests.pool import RankFailedError, RankPool

STEPS = 4
BETA1, BETA2, EPS, DECAY, CLIP, EMA = 0.8, 0.9, 1e-3, 0.25, 0.5, 0.75
RATES = (5e-3, 1e-2, 1e-2, 4e-3)
"""Two steps of warm-up to 0.01, and a milestone of 0.004 from the step with number 3 on."""
PARTS = ("model", "exp_avg", "exp_avg_sq", "ema")


def run_of(folder: Path, *, steps: int = STEPS) -> RunConfig:
    optimizer = {
        "lr": 1e-2, "lr_milestones": ((3, 4e-3),), "warmup_steps": 2, "beta1": BETA1, "beta2": BETA2, "eps": EPS,
        "weight_decay": DECAY, "clip_grad": CLIP, "ema_decay": EMA,
    }  # fmt: skip
    config = tiny_run(folder, steps=steps, parallel=layout(), interval_steps=1, optimizer=optimizer)
    return replace(config, checkpoint=replace(config.checkpoint, keep=0))


@pytest.fixture(scope="module")
def straight(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on one rank, each with its checkpoint."""
    folder = tmp_path_factory.mktemp("steps") / "run"
    pool.run(1, train_on_rank, run_of(folder))
    return folder


def held(run_dir: Path, step: int) -> dict[str, dict[str, Tensor]]:
    """Part -> release name -> tensor of a step's checkpoint, in fp64."""
    folder = store.step_folder(run_dir / "checkpoints", step)
    readers = {part: MegatronReader(folder, prefix=f"{part}.") for part in PARTS}
    return {
        part: {key: as_torch(reader.rows(key), info).double() for key, info in reader.infos.items()} for part, reader in readers.items()
    }


@pytest.fixture(scope="module")
def history(straight: Path) -> list[dict[str, dict[str, Tensor]]]:
    """Before the first step and after each."""
    config, first = run_of(straight), {}
    for key, shape in canonical_shapes(config.model).items():
        zero = (0,) * len(shape)
        whole = Piece(key=key, global_shape=shape, shape=shape, global_offset=zero, local_offset=zero)
        first[key] = initial_values(whole, seed=config.init.seed, device=torch.device("cpu")).double()
    nothing = {key: torch.zeros_like(value) for key, value in first.items()}
    start = {"model": first, "exp_avg": nothing, "exp_avg_sq": nothing, "ema": first}
    return [start, *(held(straight, step) for step in range(1, STEPS + 1))]


def test_weights_move_as_adamw_says(history: list[dict[str, dict[str, Tensor]]]) -> None:
    # Loshchilov & Hutter, arXiv 1711.05101, algorithm 2; biases and norm scales are not decayed (Megatron-core's standard groups)
    for step, (before, after) in enumerate(zip(history, history[1:], strict=False), start=1):
        rate = RATES[step - 1]
        for key, weight in before["model"].items():
            mean = after["exp_avg"][key] / (1 - BETA1**step)
            width = (after["exp_avg_sq"][key] / (1 - BETA2**step)).sqrt() + EPS
            decay = DECAY if weight.dim() == 2 else 0.0
            wanted = weight - rate * (mean / width + decay * weight)
            torch.testing.assert_close(after["model"][key], wanted, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_moments_average_gradients_that_were_clipped(straight: Path, history: list[dict[str, dict[str, Tensor]]]) -> None:
    norms = [record["grad_norm"] for record in metrics(straight)]
    for norm, before, after in zip(norms, history, history[1:], strict=False):
        squared = 0.0
        for key in before["model"]:
            gradient = (after["exp_avg"][key] - BETA1 * before["exp_avg"][key]) / (1 - BETA1)
            square = (after["exp_avg_sq"][key] - BETA2 * before["exp_avg_sq"][key]) / (1 - BETA2)
            torch.testing.assert_close(gradient.square(), square, rtol=1e-3, atol=1e-6 * max(1e-6, float(square.max())))
            squared += float(gradient.square().sum())
        assert squared**0.5 == pytest.approx(min(norm, CLIP), rel=1e-4)
    assert max(norms) > CLIP  # or nothing was clipped


def test_the_average_moves_toward_the_new_weights(history: list[dict[str, dict[str, Tensor]]]) -> None:
    for before, after in zip(history, history[1:], strict=False):
        for key, average in before["ema"].items():
            torch.testing.assert_close(after["ema"][key], EMA * average + (1 - EMA) * after["model"][key], rtol=1e-6, atol=1e-7)


def test_the_log_says_the_rate_of_its_step(straight: Path) -> None:
    assert [record["lr"] for record in metrics(straight)] == pytest.approx(RATES)


def test_a_resumed_run_holds_the_same_bits(pool: RankPool, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight / "assets", run_dir / "assets")
    pool.run(1, train_on_rank, run_of(run_dir, steps=2))
    pool.run(1, train_on_rank, run_of(run_dir))
    assert [(r["samples"], r["loss"]) for r in metrics(run_dir)] == [(r["samples"], r["loss"]) for r in metrics(straight)]
    ours, theirs = held(run_dir, STEPS), held(straight, STEPS)
    assert all(torch.equal(ours[part][key], theirs[part][key]) for part in PARTS for key in theirs[part])
    states = [store.read_manifest(store.step_folder(path / "checkpoints", STEPS))["state"] for path in (run_dir, straight)]
    assert states[0] == states[1]
    assert states[0]["samples_seen"] == sum(record["samples"] for record in metrics(straight))
    with pytest.raises(RankFailedError, match="has another seed"):
        pool.run(1, train_on_rank, replace(run_of(run_dir), train=replace(run_of(run_dir).train, seed=7)))


def test_a_loss_that_is_no_number_ends_the_run(pool: RankPool, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight / "assets", run_dir / "assets")
    config = run_of(run_dir)
    # the first step moves every weight by about 1e30
    wild = replace(config, optimizer=replace(config.optimizer, lr=1e30, lr_milestones=(), warmup_steps=0))
    wild = replace(wild, guard=GuardConfig(on_bad_step="stop"))
    with pytest.raises(RankFailedError, match=r"loss is \w+ at step 2; the last checkpoint is good"):
        pool.run(1, train_on_rank, wild)
    assert [entry.step for entry in store.complete_checkpoints(run_dir / "checkpoints")] == [1]

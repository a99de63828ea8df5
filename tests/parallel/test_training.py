"""Whole runs: any layout and any change of layout gives the same curve, a broken clip costs a sample, a checkpoint restores everything."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megasora import recipes
from megasora.checkpoint import store
from megasora.checkpoint.formats.canonical import canonical_shapes
from megasora.checkpoint.source import open_source
from megasora.config.schema import ParallelConfig, RunConfig
from megasora.models.mmdit.initialization import initial_values
from megasora.parallel.shards import Piece
from megasora.training.checkpoints import RunCheckpoints
from megasora.training.diffusion import DiffusionTrainer
from megasora.training.feed import StepBatch
from megasora.training.metrics import MetricsLog, StepRecord
from megasora.training.step import StepResult
from tests.parallel.runs import metrics, tiny_run, train_on_rank
from tests.parallel.test_parity import layout
from tests.pool import RankFailedError, RankPool

STEPS = 20
CURVE = 1e-5
"""Largest relative difference of fp32 loss and gradient norm per step over 20 steps."""


@pytest.fixture(scope="module")
def straight(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps on one rank."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    pool.run(1, train_on_rank, tiny_run(run_dir, steps=STEPS, parallel=ParallelConfig()))
    return run_dir


def assert_same_curve(run_dir: Path, straight: Path, *, steps: int = STEPS) -> None:
    expected, found = metrics(straight)[:steps], metrics(run_dir)
    assert [record["step"] for record in found] == list(range(1, steps + 1))
    for one, other in zip(expected, found, strict=True):
        assert other["samples"] == one["samples"]
        assert abs(other["loss"] / one["loss"] - 1) < CURVE, (one["step"], one["loss"], other["loss"])
        assert abs(other["grad_norm"] / one["grad_norm"] - 1) < CURVE, (one["step"], one["grad_norm"], other["grad_norm"])


def assert_same_weights(run_dir: Path, straight: Path, *, select: str = "model") -> None:
    """||a - b|| / ||w20 - w0|| per tensor <= 1e-3 and over all <= 1e-4; w0 comes from the same initialisation."""
    first = store.step_folder(straight / "checkpoints", STEPS)
    seed = recipes.get("tiny").init.seed
    a = open_source(store.step_folder(run_dir / "checkpoints", STEPS), select=select)  # type: ignore[arg-type]
    b = open_source(first, select=select)  # type: ignore[arg-type]
    total_gap = total_update = 0.0
    for key, shape in canonical_shapes(b.model).items():
        reference = b.read(key)
        zero = (0,) * len(shape)
        whole = Piece(key=key, global_shape=shape, shape=shape, global_offset=zero, local_offset=zero)
        origin = initial_values(whole, seed=seed, device=torch.device("cpu"))
        gap, update = float((a.read(key) - reference).norm()), float((reference - origin).norm())
        assert gap <= 1e-3 * max(update, 1e-12), (key, gap, update)
        total_gap, total_update = total_gap + gap**2, total_update + update**2
    assert total_gap**0.5 <= 1e-4 * total_update**0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(8, layout(tp=2, pp=2, cp=2)), (4, layout(tp=2, pp=2, vp=2)), (3, layout())],
    ids=["tp2 pp2 cp2", "tp2 pp2 vp2", "dp3"],
)
def test_a_layout_repeats_the_curve_of_one_rank(
    pool: RankPool, straight: Path, tmp_path: Path, world_size: int, parallel: ParallelConfig
) -> None:
    shutil.copytree(straight / "assets", tmp_path / "run" / "assets")
    pool.run(world_size, train_on_rank, tiny_run(tmp_path / "run", steps=STEPS, parallel=parallel))
    assert_same_curve(tmp_path / "run", straight)
    assert_same_weights(tmp_path / "run", straight)
    assert_same_weights(tmp_path / "run", straight, select="ema")


@pytest.mark.slow
def test_a_memory_limit_takes_more_micro_batches_and_keeps_the_curve(pool: RankPool, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "assets", tmp_path / "run" / "assets")
    # most steps do not fit two packs of 110 tokens and take four, some do: the number changes from step to step, interleaved
    limited = tiny_run(tmp_path / "run", steps=8, parallel=layout(tp=2, pp=2, vp=2), data={"max_pack_tokens": 110})
    pool.run(4, train_on_rank, limited)
    assert_same_curve(tmp_path / "run", straight, steps=8)


def steps_saved_before_their_record(rank: int, config: RunConfig) -> list[int]:
    """Train with all the time in the world for saves to be written and committed; the steps whose checkpoint was there first."""
    early: list[int] = []
    happened, write = RunCheckpoints.happened, MetricsLog.write

    def late(checkpoints: RunCheckpoints[Any], *, last: bool) -> list[dict[str, Any]]:
        time.sleep(0.3)
        return happened(checkpoints, last=last)

    def looked(log: MetricsLog, record: StepRecord) -> None:
        time.sleep(0.3)
        early.extend(
            entry.step for entry in store.complete_checkpoints(Path(str(config.run_dir)) / "checkpoints") if entry.step >= record.step
        )
        write(log, record)

    with mock.patch.object(RunCheckpoints, "happened", late), mock.patch.object(MetricsLog, "write", looked):
        train_on_rank(rank, config)
    return early


def test_a_checkpoint_is_not_there_before_its_step_is_recorded(pool: RankPool, straight: Path, tmp_path: Path) -> None:
    """A rank that dies between the two would leave a step out of metrics.jsonl. The last step's record tells of its own checkpoint."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "assets").symlink_to(straight / "assets")
    assert pool.run(1, steps_saved_before_their_record, tiny_run(tmp_path / "run", steps=4, interval_steps=1, parallel=layout())) == [[4]]


def stopped_at_two(rank: int, config: RunConfig) -> None:
    """Asked to stop while it makes its second step."""
    take_step = DiffusionTrainer.take_step

    def asked(trainer: DiffusionTrainer, batch: StepBatch) -> StepResult:
        trainer.stop.asked = trainer.trainee.step == 1
        return take_step(trainer, batch)

    with mock.patch.object(DiffusionTrainer, "take_step", asked):
        train_on_rank(rank, config)


def test_who_asks_a_run_to_stop_waits_for_a_save_alone(pool: RankPool, straight: Path, tmp_path: Path) -> None:
    """Held-out losses and sample clips of a large model take minutes, and the time before a kill may be two."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "assets").symlink_to(straight / "assets")
    config = tiny_run(tmp_path / "run", steps=4, parallel=layout())
    evaluation = replace(config.evaluation, interval_steps=2, sample_interval_steps=2, sample_prompts=("a",))
    pool.run(1, stopped_at_two, replace(config, evaluation=evaluation, sample=replace(config.sample, steps=2)))
    first, last = metrics(tmp_path / "run")
    assert [event["event"] for event in first["events"]] == ["eval"]  # before the first step
    assert [event["event"] for event in last["events"]] == ["checkpoint", "stop"]


@pytest.mark.slow
def test_a_run_goes_on_in_other_layouts(pool: RankPool, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight / "assets", run_dir / "assets")
    pool.run(4, train_on_rank, tiny_run(run_dir, steps=4, parallel=layout(tp=2, pp=2)))
    pool.run(2, train_on_rank, tiny_run(run_dir, steps=8, parallel=layout(cp=2)))
    pool.run(3, train_on_rank, tiny_run(run_dir, steps=STEPS, parallel=layout()))
    assert_same_curve(run_dir, straight)
    assert_same_weights(run_dir, straight)
    assert_same_weights(run_dir, straight, select="ema")
    events = [event["event"] for record in metrics(run_dir) for event in record["events"]]
    assert events == ["checkpoint", "restart", "checkpoint", "restart", "checkpoint"]


@pytest.mark.slow
def test_killed_runs_of_3_and_5_ranks_go_on_with_2_on_the_same_samples(pool: RankPool, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight / "assets", run_dir / "assets")
    for world_size, killed_at in ((3, 6), (5, 13)):
        pool.run(world_size, train_on_rank, tiny_run(run_dir, steps=killed_at, parallel=layout(), interval_steps=4))
        shutil.rmtree(store.step_folder(run_dir / "checkpoints", killed_at))  # a killed run has only what it saved on the way
    pool.run(2, train_on_rank, tiny_run(run_dir, steps=STEPS, parallel=layout()))
    assert_same_curve(run_dir, straight)
    assert_same_weights(run_dir, straight)
    assert [event["step"] for record in metrics(run_dir) for event in record["events"] if event["event"] == "restart"] == [4, 12]


@pytest.mark.slow
def test_a_clip_that_fails_in_the_middle_costs_one_sample(pool: RankPool, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight / "assets", run_dir / "assets")
    broken = run_dir / "assets" / "clips" / "clip005.mp4"
    broken.write_bytes(broken.read_bytes()[:600])
    pool.run(8, train_on_rank, tiny_run(run_dir, steps=8, parallel=layout(tp=2, pp=2, cp=2)))
    records = metrics(run_dir)
    skips = [(record["step"], event) for record in records for event in record["events"] if event["event"] == "skip"]
    assert skips
    assert all(event["clip"] == "5" and "clip005.mp4" in event["reason"] for _, event in skips)
    whole = {record["step"]: record["samples"] for record in metrics(straight)}
    for record in records:
        missing = sum(step == record["step"] for step, _ in skips)
        assert record["samples"] == whole[record["step"]] - missing
        assert record["loss"] is not None


@pytest.mark.parametrize(("damage", "said"), [("torn", "4 bytes, its manifest says"), ("one bit", "another SHA-256")])
def test_a_damaged_checkpoint_is_passed_over(pool: RankPool, tmp_path: Path, damage: str, said: str) -> None:
    run_dir = tmp_path / "run"
    config = tiny_run(run_dir, steps=2, parallel=layout(), interval_steps=1)
    pool.run(1, train_on_rank, config)
    last = store.step_folder(run_dir / "checkpoints", 2)
    file = next(last.glob("*.distcp"))
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(b"torn" if damage == "torn" else whole)
    pool.run(1, train_on_rank, config)
    records = metrics(run_dir)
    assert [record["step"] for record in records] == [1, 2]
    (event,) = [event for event in records[1]["events"] if event["event"] == "restart"]
    (refused,) = event.pop("refused")
    assert event == {"event": "restart", "from": "step_00000001", "step": 1, "note": "resumed"}
    assert refused["path"] == "step_00000002"
    assert said in refused["reason"]
    assert [entry.step for entry in store.complete_checkpoints(run_dir / "checkpoints")] == [1, 2]
    assert (run_dir / "checkpoints" / "refused_step_00000002_2").is_dir()


def test_a_checkpoint_of_another_model_is_refused(pool: RankPool, tmp_path: Path) -> None:
    from dataclasses import replace

    config = tiny_run(tmp_path / "run", steps=1, parallel=layout())
    pool.run(1, train_on_rank, config)
    other = replace(config, model=replace(config.model, num_single_blocks=3))
    with pytest.raises(RankFailedError, match="another model"):
        pool.run(1, train_on_rank, other)


@pytest.mark.slow
def test_overlapped_communication_repeats_the_curve(pool: RankPool, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight / "assets", run_dir / "assets")
    parallel = layout(overlap_grad_reduce=True, overlap_param_gather=True)
    pool.run(2, train_on_rank, tiny_run(run_dir, steps=4, parallel=parallel, interval_steps=2))
    for one, other in zip(metrics(straight), metrics(run_dir), strict=False):
        assert abs(other["loss"] / one["loss"] - 1) < CURVE
        assert abs(other["grad_norm"] / one["grad_norm"] - 1) < CURVE
    # a checkpoint written in the middle holds the step's own weights: going on from it repeats the rest
    shutil.rmtree(store.step_folder(run_dir / "checkpoints", 4))
    before = metrics(run_dir)
    pool.run(2, train_on_rank, tiny_run(run_dir, steps=4, parallel=parallel, interval_steps=2))
    for one, other in zip(before, metrics(run_dir), strict=True):
        assert abs(other["loss"] / one["loss"] - 1) < CURVE


@pytest.mark.slow
def test_a_bf16_run_goes_on_exactly_where_it_stopped(pool: RankPool, tmp_path: Path) -> None:
    from dataclasses import replace

    def config(name: str, steps: int) -> RunConfig:
        made = tiny_run(tmp_path / name, steps=steps, parallel=layout(tp=2))
        return replace(made, precision=replace(made.precision, dtype="bf16"))

    pool.run(2, train_on_rank, config("straight", 8))
    shutil.copytree(tmp_path / "straight" / "assets", tmp_path / "stopped" / "assets")
    pool.run(2, train_on_rank, config("stopped", 3))
    pool.run(2, train_on_rank, config("stopped", 8))
    assert [r["loss"] for r in metrics(tmp_path / "stopped")] == [r["loss"] for r in metrics(tmp_path / "straight")]
    for select in ("model", "master", "ema"):
        one = open_source(store.step_folder(tmp_path / "straight" / "checkpoints", 8), select=select)  # type: ignore[arg-type]
        other = open_source(store.step_folder(tmp_path / "stopped" / "checkpoints", 8), select=select)  # type: ignore[arg-type]
        assert all(torch.equal(one.read(key), other.read(key)) for key in one.shapes)


def test_replicas_share_out_the_sample_clips(pool: RankPool, tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "run", steps=2, parallel=layout(tp=2))
    config = replace(
        config,
        train=replace(config.train, tensorboard=True),
        evaluation=replace(config.evaluation, sample_interval_steps=2, sample_prompts=("a", "b", "c")),
        sample=replace(config.sample, steps=2),
    )
    pool.run(4, train_on_rank, config)
    (event,) = [event for record in metrics(tmp_path / "run") for event in record["events"] if event["event"] == "sample"]
    assert event["files"] == [f"step_00000002_{number:02d}.mp4" for number in range(3)]
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == event["files"]
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert {tag for tag in board.Tags()["images"] if tag.startswith("samples/")} == {f"samples/{number}" for number in range(3)}


def test_a_warning_to_every_process_saves_and_ends(tmp_path: Path) -> None:
    """What Slurm does before the time limit: SIGUSR1 to the rank and to all its children, after a first checkpoint has started some."""
    run_dir = tmp_path / "run"
    flags = ["--run_dir", str(run_dir), "--device", "cpu", "--evaluation.interval_steps", "0", "--checkpoint.interval_steps", "2"]
    command = [sys.executable, "-m", "megasora", "train", "tiny", "--train.steps", "100000", *flags]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGUSR1)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-2000:]
    last = metrics(run_dir)[-1]
    assert [event["event"] for event in last["events"]][-2:] == ["checkpoint", "stop"]
    assert store.complete_checkpoints(run_dir / "checkpoints")[-1].step == last["step"]


def test_a_second_run_is_refused_and_a_killed_one_goes_on(tmp_path: Path) -> None:
    """The command as people type it: twice in one folder, then again after kill -9."""
    run_dir = tmp_path / "run"
    flags = ["--run_dir", str(run_dir), "--device", "cpu", "--evaluation.interval_steps", "0", "--checkpoint.interval_steps", "1"]
    command = [sys.executable, "-m", "megasora", "train", "tiny", *flags, "--train.no-tensorboard", "--train.steps"]
    first = subprocess.Popen([*command, "100000"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        second = subprocess.run([*command, "100000"], capture_output=True, text=True, timeout=120, check=False)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2, second.stderr
    assert f"belongs to a run that is alive (host {os.uname().nodename}, pid {first.pid}, for" in second.stderr
    saved = store.complete_checkpoints(run_dir / "checkpoints")[-1].step
    subprocess.run([*command, str(saved + 1)], capture_output=True, timeout=120, check=True)
    last = metrics(run_dir)[-1]
    assert last["step"] == saved + 1
    assert [(event["event"], event.get("step")) for event in last["events"]] == [("restart", saved), ("checkpoint", None)]


def test_columns_that_nobody_reads_are_named_once(pool: RankPool, straight: Path, tmp_path: Path) -> None:
    lines = (straight / "assets" / "clips" / "train.csv").read_text().splitlines()
    clips = straight / "assets" / "clips"
    rows = [f"{clips}/{line},0.5,7" for line in lines[1:]]
    (tmp_path / "m.csv").write_text("\n".join([f"{lines[0]},score_aes,vmaf_motion", *rows]) + "\n")
    pool.run(1, train_on_rank, tiny_run(tmp_path / "run", steps=2, parallel=layout(), data={"manifest": str(tmp_path / "m.csv")}))
    events = [event for record in metrics(tmp_path / "run") for event in record["events"] if event["event"] == "columns"]
    assert events == [{"event": "columns", "unread": ["score_aes"]}]

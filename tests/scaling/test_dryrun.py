"""A dry run counts what the closed forms say: FLOPs, messages and state to the last digit, activations within 5 %."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megasora.config.errors import UserError
from megasora.config.memory import stage_estimate
from megasora.config.schema import ParallelConfig, PrecisionConfig
from megasora.perf.hardware import load_hardware
from megasora.scaling.dryrun.classes import classes_of_step, rank_classes
from megasora.scaling.dryrun.expected import compare
from megasora.scaling.dryrun.result import DryRun
from megasora.scaling.dryrun.room import room_line, room_of
from megasora.scaling.dryrun.run import dry_run
from megasora.scaling.workload import planned_clips, steps_of
from tests.scaling.layouts import CASES, Job, job

CLOSE = 0.05
"""Of activations, where every pack is the fullest that the settings allow."""


_runs: dict[tuple[Job, int], DryRun] = {}


def run_of(apart: Executor, of: Job, rank: int) -> DryRun:
    """A rank's dry run; each is made once."""
    if (of, rank) not in _runs:
        _runs[of, rank] = apart.submit(dry_run, of.config, world_size=of.world_size, rank=rank, clips=of.clips).result()
    return _runs[of, rank]


@pytest.mark.parametrize(("name", "rank"), [(name, rank) for name, of in CASES.items() for rank in of.ranks])
def test_counts_equal_the_closed_forms(apart: Executor, name: str, rank: int) -> None:
    of = CASES[name]
    run = run_of(apart, of, rank)
    compared = {one.name: one for one in compare(run, of.config)}
    activations = compared.pop("activations")
    assert {one.name: one.counted for one in compared.values()} == {one.name: one.computed for one in compared.values()}
    assert run.total_flops > 0
    if of.clips == "largest":
        assert activations.counted == pytest.approx(activations.computed, rel=CLOSE)


def test_the_replicas_optimizer_shards_are_the_estimates_whole(apart: Executor) -> None:
    of = job(3, m=2)
    runs = [run_of(apart, of, rank) for rank in range(3)]
    estimate = stage_estimate(of.config, stage=0, world_size=3)
    assert {run.memory.weights for run in runs} == {estimate.weights}
    assert {run.memory.gradients for run in runs} == {estimate.gradients}
    assert sum(run.memory.optimizer for run in runs) == pytest.approx(3 * estimate.optimizer, rel=1e-12)
    assert sum(run.memory.ema for run in runs) == pytest.approx(3 * estimate.ema, rel=1e-12)


def test_gradients_overlap_the_backward_pass_on_gpus_by_themselves(apart: Executor) -> None:
    run = run_of(apart, CASES["dp2"], 0)
    overlapping = {(message.kind, message.phase) for message in run.messages if message.overlaps}
    assert overlapping == {("reduce_scatter", "backward"), ("all_gather", "forward")}


def test_messages_of_tensor_and_context_groups_are_exposed(apart: Executor) -> None:
    run = run_of(apart, CASES["tp2 pp2 cp2"], 0)
    assert not any(message.overlaps for message in run.messages if message.group in ("tp", "ulysses", "pp"))


def test_interleaved_stages_send_beside_their_computation(apart: Executor) -> None:
    run = run_of(apart, CASES["pp2 vp2"], 0)
    assert all(message.overlaps for message in run.messages if message.group == "pp" and message.kind == "send")


def test_the_timeline_is_the_schedule(apart: Executor) -> None:
    run = run_of(apart, CASES["pp2"], 0)
    assert [(event.phase, event.microbatch) for event in run.timeline] == [
        ("forward", 0),
        ("forward", 1),
        ("backward", 0),
        ("forward", 2),
        ("backward", 1),
        ("backward", 2),
        ("step end", 0),
    ]
    assert max(event.peak for event in run.timeline) == run.memory.activations
    assert run.timeline[-1].after < 1000


def test_chunks_take_turns_in_the_interleaved_timeline(apart: Executor) -> None:
    run = run_of(apart, CASES["pp2 vp2"], 0)
    forwards = [(event.chunk, event.microbatch) for event in run.timeline if event.phase == "forward"]
    backwards = [(event.chunk, event.microbatch) for event in run.timeline if event.phase == "backward"]
    assert forwards == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert backwards == [(1, 0), (1, 1), (0, 0), (0, 1), (1, 2), (1, 3), (0, 2), (0, 3)]


@pytest.mark.parametrize("name", ["tp2 pp2 cp2", "dp3 uneven", "cp4 ring full uneven", "pp4 dp2"])
def test_classes_cover_every_rank_once(name: str) -> None:
    of = CASES[name]
    classes = rank_classes(of.config, of.world_size, clips=of.clips)
    assert sorted(rank for one in classes for rank in one.ranks) == list(range(of.world_size))
    assert all(one.rank in one.ranks for one in classes)


def test_alike_ranks_do_the_same(apart: Executor) -> None:
    of = CASES["tp2 pp2 cp2"]
    for one in rank_classes(of.config, of.world_size, clips="largest"):
        first, last = (run_of(apart, of, rank) for rank in (one.ranks[0], one.ranks[-1]))
        assert first.flops == last.flops
        assert [(m.kind, m.group, m.phase, m.bytes) for m in first.messages] == [(m.kind, m.group, m.phase, m.bytes) for m in last.messages]
        for one_pass, other in zip(first.timeline, last.timeline, strict=True):
            assert (one_pass.phase, one_pass.chunk, one_pass.microbatch) == (other.phase, other.chunk, other.microbatch)
            assert one_pass.peak == pytest.approx(other.peak, abs=64)  # counters of samples, which only some ranks make


def test_members_of_a_ring_are_told_apart_where_their_tokens_differ() -> None:
    of = job(2, context_parallel_size=2, context_parallel_backend="ring", samples=1)
    step = steps_of(of.config, planned_clips(of.config, clips="largest"), world_size=2)[0]
    assert len(classes_of_step(of.config, step, world_size=2)) == 1
    odd = job(2, context_parallel_size=2, context_parallel_backend="ring", samples=1, text_tokens=63)
    step = steps_of(odd.config, planned_clips(odd.config, clips="largest"), world_size=2)[0]
    assert [one.ring_rank for one in classes_of_step(odd.config, step, world_size=2)] == [0, 1]


def test_many_different_replicas_are_counted_to_busier_ones() -> None:
    of = job(24, m=1, clips="drawn", samples=12)
    classes = rank_classes(of.config, 24, clips="drawn")
    assert len(classes) <= 6
    assert any(one.match == "at most" for one in classes)
    assert sorted(rank for one in classes for rank in one.ranks) == list(range(24))


@pytest.mark.parametrize(
    ("rank", "world_size", "changes", "message"),
    [
        (9, 8, {}, "--rank 9 is outside a world of 8 GPUs; use 0 to 7"),
        (0, 0, {}, "--gpus 0 must be a positive number"),
        (0, 3, {"tensor_model_parallel_size": 2}, "not a multiple of TP x PP x CP"),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_cure(rank: int, world_size: int, changes: dict[str, Any], message: str) -> None:
    config = job(8).config
    with pytest.raises(UserError, match=re.escape(message)):
        dry_run(replace(config, parallel=ParallelConfig(**changes)), world_size=world_size, rank=rank, clips="largest")


def test_fp8_is_refused() -> None:
    config = replace(job(8).config, precision=PrecisionConfig(fp8="tensorwise"), device="cuda")
    with pytest.raises(UserError, match="dry-run with --precision.fp8 none"):
        dry_run(config, world_size=8, rank=0, clips="largest")


def test_the_fullest_rank_decides_whether_there_is_room(apart: Executor) -> None:
    of = CASES["pp2"]
    runs = [run_of(apart, of, rank) for rank in (0, 1)]
    h100 = load_hardware("h100")
    fullest = max(run.memory.total for run in runs)
    plenty = room_of(runs, of.config, gpu=h100)
    assert (plenty.peak, plenty.fits, plenty.cure) == (fullest, True, None)
    assert "h100 has 80 GB: it fits" in room_line(plenty)
    scarce = room_of(runs, of.config, gpu=replace(h100, memory_bytes=fullest + plenty.workspace - 1.0))
    assert not scarce.fits
    assert scarce.cure is not None and scarce.cure.startswith("use --")
    assert scarce.cure in room_line(scarce)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--rank", "1"], ["--all"]])
def test_the_command_prints_json_alone(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megasora", "dryrun", "tiny", "--gpus", "2", "--clips", "drawn", *words, "--json"]
    done = subprocess.run([*command, "--output", str(tmp_path / "found")], capture_output=True, text=True, check=True)
    data = json.loads(done.stdout)
    assert data["world_size"] == 2
    assert json.loads((tmp_path / "found" / "dryrun.json").read_text()) == data
    assert (data["room"]["gpu"], data["room"]["fits"], data["room"]["cure"]) == ("h200", True, None)

"""`megasora evaluate vbench make` with a trained run: the clips are those of `megasora sample`, in every layout and whoever makes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megasora.checkpoint import store
from megasora.cli.commands.evaluate.vbench import make
from megasora.config.io import load_yaml
from megasora.config.schema import ParallelConfig
from megasora.evaluation.files import ClipFacts, clip_facts
from megasora.evaluation.vbench.prompts import clip_seed
from megasora.inference.requests import Common
from megasora.inference.sample import Wanted, run_sample
from tests.parallel.runs import tiny_run, train_on_rank
from tests.parallel.test_parity import layout
from tests.pool import RankPool

SEED = 11
SIZE = {"height": 32, "width": 48, "num_frames": 5, "steps": 2}


@pytest.fixture(scope="module")
def run_dir(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("run") / "run"
    pool.run(1, train_on_rank, tiny_run(folder, steps=1, parallel=layout()))
    return folder


def make_on_rank(rank: int, run_dir: str, prompts: str, output: str, parallel: ParallelConfig, shard: str) -> None:
    """The command on one rank of a pool."""
    config = load_yaml(Path(run_dir) / "config.yaml")
    sample = replace(config.sample, seed=SEED, **SIZE)  # type: ignore[arg-type]
    arguments: dict[str, Any] = {
        "source": "tiny",
        "config": replace(config, parallel=parallel, sample=sample),
        "weights": store.step_folder(Path(run_dir) / "checkpoints", 1),
        "prompts": Path(prompts),
        "output": Path(output),
        "samples": 2,
        "shard": shard,
    }
    make.run(make.Args(**arguments))


def sample_on_rank(rank: int, run_dir: str, output: str, prompt: str, seed: int) -> None:
    """`megasora sample` on one rank of a pool."""
    config = load_yaml(Path(run_dir) / "config.yaml")
    weights = store.step_folder(Path(run_dir) / "checkpoints", 1)
    config = replace(config, sample=replace(config.sample, seed=seed, **SIZE))  # type: ignore[arg-type]
    common = Common(kind=None, negative="", resolution=None, aspect=None, num_samples=1)
    run_sample(config, Wanted(prompt=(prompt,), common=common), weights=weights, output=Path(output))


@pytest.mark.slow
def test_clips_are_those_of_sample_in_every_layout_and_share(pool: RankPool, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red car\na blue cup\n")
    for shard in ("0/2", "1/2"):
        pool.run(1, make_on_rank, str(run_dir), str(tmp_path / "prompts.txt"), str(tmp_path / "clips"), layout(), shard)
    names = {f"{prompt}-{index}.mp4" for prompt in ("a red car", "a blue cup") for index in (0, 1)}
    assert {path.name for path in (tmp_path / "clips").iterdir()} == {*names, "vbench_plan.csv"}
    made = {name: (tmp_path / "clips" / name).read_bytes() for name in names}
    assert len(set(made.values())) == 4
    assert all(clip_facts(tmp_path / "clips" / name) == ClipFacts(num_frames=5, height=32, width=48) for name in names)
    pool.run(1, sample_on_rank, str(run_dir), str(tmp_path / "one"), "a blue cup", clip_seed(SEED, "a blue cup", 1))
    assert (tmp_path / "one" / "sample_000.mp4").read_bytes() == made["a blue cup-1.mp4"]
    kept = tmp_path / "clips" / "a red car-0.mp4"
    before = kept.stat().st_mtime_ns
    (tmp_path / "clips" / "a red car-1.mp4").unlink()
    pool.run(2, make_on_rank, str(run_dir), str(tmp_path / "prompts.txt"), str(tmp_path / "clips"), layout(cp=2), "0/1")
    assert kept.stat().st_mtime_ns == before
    assert clip_facts(tmp_path / "clips" / "a red car-1.mp4") == ClipFacts(num_frames=5, height=32, width=48)

"""Sampling and exporting a trained run: the seed gives the same clip in every layout, the export the same weights."""

from __future__ import annotations

import filecmp
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file

from megasora.checkpoint import store
from megasora.checkpoint.export import export_weights
from megasora.checkpoint.inspect import describe
from megasora.checkpoint.source import open_source
from megasora.config.errors import UserError
from megasora.config.io import load_yaml
from megasora.config.schema import ParallelConfig
from megasora.inference.requests import Common
from megasora.inference.sample import Extras, Wanted, run_sample
from tests.parallel.runs import tiny_run, train_on_rank
from tests.parallel.test_parity import layout
from tests.pool import RankPool


@pytest.fixture(scope="module")
def run_dir(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, trained in TP2."""
    folder = tmp_path_factory.mktemp("run") / "run"
    pool.run(2, train_on_rank, tiny_run(folder, steps=3, parallel=layout(tp=2)))
    return folder


def sample_on_rank(rank: int, run_dir: str, output: str, parallel: ParallelConfig, image: str | None) -> None:
    """`megasora sample` on one rank of a pool."""
    config = replace(load_yaml(Path(run_dir) / "config.yaml"), parallel=parallel)
    weights = store.step_folder(Path(run_dir) / "checkpoints", 3)
    config = replace(config, sample=replace(config.sample, steps=3, width=80, height=48, num_frames=9))
    common = Common(kind=None, negative="", resolution=None, aspect=None, num_samples=1)
    wanted = Wanted(prompt=("a test card",), image=None if image is None else Path(image), common=common)
    run_sample(config, wanted, weights=weights, output=Path(output), extras=Extras(save_latents=True))


@pytest.mark.slow
@pytest.mark.parametrize("image", [False, True], ids=["t2v", "i2v"])
def test_the_seed_gives_the_same_clip_in_every_layout(pool: RankPool, run_dir: Path, tmp_path: Path, image: bool) -> None:
    given = str(run_dir / "assets" / "clips" / "clip007.png") if image else None
    pool.run(1, sample_on_rank, str(run_dir), str(tmp_path / "one"), layout(), given)
    parallel = layout(tp=2, pp=2, vp=2) if image else layout(tp=2, cp=2)
    pool.run(4, sample_on_rank, str(run_dir), str(tmp_path / "four"), parallel, given)
    one, four = (tmp_path / name / "sample_000.mp4" for name in ("one", "four"))
    with av.open(str(one)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.frames) == (80, 48, 9)
    made = [load_file(path.with_suffix(".safetensors"))["latent"] for path in (one, four)]  # before 8 bits and H.264
    assert made[0].shape == (16, 3, 6, 10)
    assert float((made[0] - made[1]).norm() / made[0].norm()) <= 1e-5  # fp32, three steps of the model


def test_exported_weights_come_back_bit_for_bit(run_dir: Path, tmp_path: Path) -> None:
    checkpoint = store.step_folder(run_dir / "checkpoints", 3)
    export_weights(checkpoint, tmp_path / "release.safetensors", target_format="opensora")
    export_weights(tmp_path / "release.safetensors", tmp_path / "fused.safetensors", target_format="opensora-fused")
    trained = open_source(checkpoint)
    for name in ("release.safetensors", "fused.safetensors"):
        exported = open_source(tmp_path / name, axes_dim=trained.model.axes_dim)
        assert exported.model == trained.model
        assert all(torch.equal(exported.read(key), trained.read(key)) for key in trained.shapes)
    with pytest.raises(UserError, match="exists"):
        export_weights(checkpoint, tmp_path / "release.safetensors", target_format="opensora")


def test_a_run_starts_from_exported_weights(pool: RankPool, run_dir: Path, tmp_path: Path) -> None:
    checkpoint = store.step_folder(run_dir / "checkpoints", 3)
    export_weights(checkpoint, tmp_path / "w.safetensors", target_format="opensora")
    config = tiny_run(tmp_path / "run", steps=1, parallel=layout(pp=2), optimizer={"lr": 1e-30})
    pool.run(2, train_on_rank, replace(config, init=replace(config.init, weights=str(tmp_path / "w.safetensors"))))
    started = open_source(store.step_folder(tmp_path / "run" / "checkpoints", 1))
    trained = open_source(checkpoint)
    # Adam moves an exact zero by the learning rate, everything else by less than its last bit
    assert all(float((started.read(key) - trained.read(key)).abs().max()) <= 1e-30 for key in trained.shapes)


def test_any_layout_exports_the_same_file(pool: RankPool, run_dir: Path, tmp_path: Path) -> None:
    checkpoint = store.step_folder(run_dir / "checkpoints", 3)
    export_weights(checkpoint, tmp_path / "w.safetensors", target_format="opensora")
    for name, world_size, parallel in (("one", 1, layout()), ("four", 4, layout(tp=2, pp=2))):
        config = tiny_run(tmp_path / name, steps=1, parallel=parallel, optimizer={"lr": 1e-60})  # below fp32: nothing moves
        pool.run(world_size, train_on_rank, replace(config, init=replace(config.init, weights=str(tmp_path / "w.safetensors"))))
        trained = store.step_folder(tmp_path / name / "checkpoints", 1)
        held = describe(trained)["checkpoint"]
        assert (held["step"], held["recipe"], held["ema"], held["optimizer"]) == (1, "tiny", True, True)
        for select in ("model", "ema"):
            target = tmp_path / f"{name}_{select}.safetensors"
            export_weights(trained, target, target_format="opensora", select=select, prove=True)  # type: ignore[arg-type]
    for select in ("model", "ema"):
        assert filecmp.cmp(tmp_path / f"one_{select}.safetensors", tmp_path / f"four_{select}.safetensors", shallow=False)

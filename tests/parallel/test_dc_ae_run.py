"""A run on the video DC-AE from beginning to end: training in two layouts, sampling, and a start from weights for 4x8x8 latents."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch

from megasora import recipes
from megasora.checkpoint.source import open_source
from megasora.config.errors import UserError
from megasora.config.io import load_yaml
from megasora.config.schema import ConditionConfig, InitConfig, RunConfig
from megasora.config.validate import problems
from megasora.data.decoding.writer import write_picture
from megasora.inference.requests import Common
from megasora.inference.sample import Wanted, run_sample
from megasora.models.autoencoders.choice import load_autoencoder
from megasora.training.encode.run import run_encode
from megasora.training.encode.settings import EncodeSettings
from megasora.training.material import DecodedClip
from megasora.training.start import Start
from tests.parallel.runs import metrics, tiny_run, train_on_rank
from tests.parallel.test_parity import layout
from tests.pool import RankFailedError, RankPool

CPU = torch.device("cpu")


def on_dc_ae(config: RunConfig) -> RunConfig:
    """The same run on the tiny DC-AE: 16 channels, patch 1, 4k frames."""
    return replace(
        config,
        model=replace(config.model, in_channels=16, patch_size=1),
        data=replace(config.data, frame_counts=(16, 8, 1), global_tokens=120),
        encoders=replace(config.encoders, spatial_compression=32, causal=False, tile_frames=16),
        sample=replace(config.sample, num_frames=20, steps=2),
    )


def sample_on_rank(rank: int, config: RunConfig, weights: str, output: str, image: str | None) -> None:
    common = Common(kind=None, negative="", resolution=None, aspect=None, num_samples=1)
    wanted = Wanted(prompt=("A rabbit",), common=common, image=None if image is None else Path(image))
    run_sample(config, wanted, weights=Path(weights), output=Path(output))


def frames_of(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.fixture(scope="module")
def run_dir(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps on two ranks that share out the tokens."""
    folder = tmp_path_factory.mktemp("dc_ae") / "run"
    pool.run(2, train_on_rank, on_dc_ae(tiny_run(folder, steps=3, parallel=layout(cp=2))))
    return folder


def test_three_steps_are_trained(run_dir: Path) -> None:
    records = metrics(run_dir)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(0 < record["loss"] < 10 for record in records)
    source = open_source(run_dir / "checkpoints" / "step_00000003")
    assert source.shapes["img_in.weight"] == (64, 16) and source.shapes["cond_in.weight"] == (64, 17)


def test_the_layout_repeats_the_curve_of_one_rank(pool: RankPool, run_dir: Path, tmp_path: Path) -> None:
    pool.run(1, train_on_rank, on_dc_ae(tiny_run(tmp_path, steps=3, parallel=layout())))
    for one, two in zip(metrics(tmp_path), metrics(run_dir), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_a_clip_is_drawn_from_it(pool: RankPool, run_dir: Path, tmp_path: Path) -> None:
    config = replace(load_yaml(run_dir / "config.yaml"), parallel=layout())
    weights = str(run_dir / "checkpoints" / "step_00000003")
    pool.run(1, sample_on_rank, config, weights, str(tmp_path / "clips"), None)
    assert frames_of(tmp_path / "clips" / "sample_000.mp4") == 20
    # of a given picture the first latent frame is four frames of it; the three that only hold it are taken away
    picture = tmp_path / "picture.png"
    write_picture(picture, torch.zeros(3, 64, 64))
    pool.run(1, sample_on_rank, config, weights, str(tmp_path / "given"), str(picture))
    assert frames_of(tmp_path / "given" / "sample_000.mp4") == 17


def test_weights_of_the_other_autoencoder_get_new_ends(run_dir: Path, pool: RankPool, tmp_path: Path) -> None:
    first = tiny_run(tmp_path / "4x8x8", steps=1, parallel=layout())
    pool.run(1, train_on_rank, first)
    weights = tmp_path / "4x8x8" / "checkpoints" / "step_00000001"
    config = on_dc_ae(first)
    start = Start(path=str(weights), select="model", notes=())
    with pytest.raises(UserError, match=r"in_channels 64 \(wanted 16\)"):
        start.open(config).fits(config.model)
    config = replace(config, run_dir=str(tmp_path / "run"), init=InitConfig(weights=str(weights), ends="new_if_other"))
    source, old = start.open(config), open_source(weights)
    assert source.fits(config.model) == []
    for key, shape in source.shapes.items():
        tensor = source.read(key)
        assert tuple(tensor.shape) == shape
        if key.startswith(("img_in.", "final_layer.linear.")):
            inputs = source.shapes[f"{key.rpartition('.')[0]}.weight"][1]
            assert 0.4 < float(tensor.abs().max()) * inputs**0.5 <= 1
        elif key.startswith("cond_in."):
            assert not tensor.any()
        else:
            assert torch.equal(tensor, old.read(key))
    pool.run(1, train_on_rank, config)
    (event,) = [event for record in metrics(tmp_path / "run") for event in record["events"] if event["event"] == "init"]
    assert "img_in, cond_in and final_layer.linear start anew: these weights have 64 input channels, this model 16" in event["notes"]


def test_the_recipe_takes_what_the_autoencoder_takes() -> None:
    config = recipes.get("opensora2_dc_ae")
    assert problems(config, world_size=160) == []
    assert {128, 96, 64, 32, 1} <= set(config.data.frame_counts) and config.sample.num_frames == 128
    wrong = replace(config, data=replace(config.data, frame_counts=(129, 97, 65, 33, 4), bucket_mix=()))
    assert any("[129, 97, 65, 33, 4]: counts are 1 or 4k from 8 on" in str(problem) for problem in problems(wrong, world_size=160))
    for encoders, said in (
        (replace(config.encoders, tile_frames=30), "tile_frames"),
        (replace(config.encoders, causal=True), "takes clips whole"),
    ):
        assert any(said in str(problem) for problem in problems(replace(config, encoders=encoders), world_size=160))


def first_step_on_rank(rank: int, config: RunConfig) -> float:
    train_on_rank(rank, config)
    return float(metrics(Path(str(config.run_dir)))[0]["loss"])


def test_given_pictures_are_held_where_it_is_asked_for(run_dir: Path, pool: RankPool, tmp_path: Path) -> None:
    base = on_dc_ae(tiny_run(tmp_path, steps=1, parallel=layout(), condition=ConditionConfig(t2v=0.0, i2v_head=1.0)))
    losses = []
    for hold in (False, True):
        folder = tmp_path / str(hold)
        shutil.copytree(run_dir / "assets", folder / "assets")
        config = replace(base, run_dir=str(folder), encoders=replace(base.encoders, hold_given=hold))
        losses += pool.run(1, first_step_on_rank, config)
    assert losses[0] != losses[1]
    autoencoder = load_autoencoder(
        replace(base.encoders, vae=str(run_dir / "assets" / "encoders" / "vae")), device=CPU, dtype=torch.float32
    )
    video = torch.rand(3, 8, 32, 32)
    clip = DecodedClip(video=video, vae=autoencoder)
    frames = video[:, [0, 0, 0, 0, 1, 2, 3, 4]]
    assert torch.equal(clip.holding((3, 0)).latent(None).mean, autoencoder.posterior(frames).mean)
    for change in ({"encoders": replace(config.encoders, causal=True)}, {"data": replace(config.data, cache="cache")}):
        found = problems(replace(config, **change), world_size=1)  # type: ignore[arg-type]
        assert any(problem.field == "encoders.hold_given" for problem in found)


def encode_on_rank(rank: int, config: RunConfig, output: Path) -> None:
    run_encode(config, EncodeSettings(output=output, samples_per_shard=4))


def test_a_cache_of_its_latents_gives_the_same_curve(run_dir: Path, pool: RankPool, tmp_path: Path) -> None:
    config = replace(load_yaml(run_dir / "config.yaml"), parallel=layout(), run_dir=str(tmp_path / "run"))
    pool.run(1, encode_on_rank, config, tmp_path / "cache")
    cached = replace(config, data=replace(config.data, cache=str(tmp_path / "cache")))
    pool.run(1, train_on_rank, cached)
    for one, two in zip(metrics(tmp_path / "run"), metrics(run_dir), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    cut = replace(cached, encoders=replace(cached.encoders, tile_frames=0), run_dir=str(tmp_path / "cut"))
    with pytest.raises(RankFailedError, match="tile_frames is 16 in the cache and 0 in this run"):
        pool.run(1, train_on_rank, cut)

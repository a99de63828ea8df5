"""An autoencoder's training in any number of ranks: ten steps' curve, restarts, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasora import recipes
from megasora.checkpoint.autoencoder import open_autoencoder
from megasora.checkpoint.autoencoder_export import export_autoencoder
from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.schema import RecoveryConfig
from megasora.data.tiny_clips import make_tiny_clips
from megasora.models.lpips import expected_shapes
from megasora.training.autoencoder.network import new_network
from megasora.training.autoencoder.run import train_autoencoder
from tests.parallel.shared_clips import SIZES
from tests.pool import RankFailedError, RankPool
from tests.unit.models.autoencoders.test_tiling import tiny_vae

STEPS = 10


def small(run_dir: Path, clips: tuple[Path, Path], *, steps: int = STEPS, weight: float = 0.5, **changes: Any) -> AutoencoderRunConfig:
    """A run of seconds: 32px clips, a discriminator from step 4."""
    config = recipes.get_autoencoder("tiny_ae")
    return replace(
        config,
        run_dir=str(run_dir),
        device="cpu",
        autoencoder=replace(config.autoencoder, sizes=SIZES, spatial_compression=4),
        discriminator=replace(config.discriminator, weight=weight, start_step=4, width=4, num_layers=2, dropout=0.2),
        data=replace(
            config.data, manifest=str(clips[0]), eval_manifest=str(clips[1]), resolution="32px", batch_size=changes.pop("batch_size", 3)
        ),
        evaluation=replace(
            config.evaluation, interval_steps=changes.pop("evaluate", 0), max_clips=2, weights=changes.pop("weights", "model")
        ),
        checkpoint=replace(config.checkpoint, interval_steps=changes.pop("interval_steps", 0)),
        train=replace(config.train, steps=steps, tensorboard=False),
        optimizer=replace(config.optimizer, lr=5e-4),  # rounding grows by Adam's steps
        recovery=RecoveryConfig(watchdog=False),
        **changes,
    )


def train_on_rank(rank: int, config: AutoencoderRunConfig) -> None:
    torch.manual_seed(1000 + rank)  # nothing may draw from it
    train_autoencoder(config)


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_tiny_clips(tmp_path_factory.mktemp("clips") / "made", num_clips=8, num_eval=2)


@pytest.fixture(scope="module")
def alone(pool: RankPool, clips: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps on one rank; its average is measured."""
    run_dir = tmp_path_factory.mktemp("alone")
    pool.run(1, train_on_rank, small(run_dir, clips, interval_steps=6, evaluate=5, weights="ema"))
    return run_dir


NUMBERS = ("loss", "pixels", "grad_norm", "generator", "balance", "discriminator", "discriminator_norm", "logits_made")


def assert_same_curve(run: Path, other: Path, *, from_step: int = 1) -> None:
    ours, theirs = records(run), {record["step"]: record for record in records(other)}
    assert [record["step"] for record in ours] == list(range(from_step, STEPS + 1))
    for record in ours:
        for name in NUMBERS:
            was, now = theirs[record["step"]][name], record[name]
            assert (was is None) == (now is None), (record["step"], name)
            if was is not None:
                assert now == pytest.approx(was, rel=1e-5, abs=1e-6), (record["step"], name)


def test_three_ranks_have_the_curve_of_one(pool: RankPool, clips: tuple[Path, Path], alone: Path, tmp_path: Path) -> None:
    pool.run(3, train_on_rank, small(tmp_path, clips))
    assert_same_curve(tmp_path, alone)
    ours = records(tmp_path)
    assert [record["discriminator"] is not None for record in ours] == [False] * 4 + [True] * 6
    assert 0 < sum(record["images"] for record in ours) < 30


def sharing(config: AutoencoderRunConfig, ranks: int) -> AutoencoderRunConfig:
    return replace(config, parallel=replace(config.parallel, context_parallel_size=ranks))


def test_a_run_goes_on_with_discriminator_and_optimizers_however_ranks_share_its_clips(
    pool: RankPool, clips: tuple[Path, Path], alone: Path, tmp_path: Path
) -> None:
    pool.run(2, train_on_rank, sharing(small(tmp_path, clips, steps=6), 2))
    pool.run(3, train_on_rank, small(tmp_path, clips, steps=8))
    pool.run(4, train_on_rank, sharing(small(tmp_path, clips, evaluate=5, weights="ema"), 2))
    assert_same_curve(tmp_path, alone)
    ours, theirs = records(tmp_path), records(alone)
    assert [event["step"] for record in ours for event in record["events"] if event["event"] == "restart"] == [6, 8]
    assert [record["images"] for record in ours] == [record["images"] for record in theirs]
    (now,), was = held_out_of(ours), held_out_of(theirs)[-1]
    assert now["step"] == was["step"] == STEPS
    assert now["psnr"] == pytest.approx(was["psnr"], abs=0.05) and now["ssim"] == pytest.approx(was["ssim"], abs=1e-3)


def held_out_of(run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for record in run for event in record["events"] if event["event"] == "reconstruct"]


def test_held_out_clips_are_measured(alone: Path) -> None:
    events = held_out_of(records(alone))
    assert [event["step"] for event in events] == [0, 5, 10]
    assert all(0 < event["psnr"] < 60 and 0 < event["ssim"] < 1 and event["lpips"] is None for event in events)


def test_average_and_weights_become_a_folder(alone: Path, tmp_path: Path) -> None:
    checkpoint = alone / "checkpoints" / f"step_{STEPS:08d}"
    held = {}
    for select in ("model", "ema"):
        source = open_autoencoder(checkpoint, select=select)  # type: ignore[arg-type]
        export_autoencoder(source, tmp_path / select, target_format="dc-ae", prove=True)
        held[select] = load_file(tmp_path / select / "model.safetensors")
    settings = replace(recipes.get_autoencoder("tiny_ae").autoencoder, sizes=SIZES, spatial_compression=4)
    network = new_network(settings, weights=str(tmp_path / "ema"), load=True, seed=0)
    assert all(torch.equal(tensor, held["ema"][name]) for name, tensor in network.module.state_dict().items())
    assert any(not torch.equal(held["ema"][name], tensor) for name, tensor in held["model"].items())


def test_a_second_stage_starts_from_the_average_with_a_new_discriminator(
    pool: RankPool, clips: tuple[Path, Path], alone: Path, tmp_path: Path
) -> None:
    config = small(tmp_path, clips, steps=1, batch_size=1, evaluate=5)
    pool.run(1, train_on_rank, replace(config, init=replace(config.init, run=str(alone))))
    (event,) = [event for event in records(tmp_path)[0]["events"] if event["event"] == "init"]
    assert event["weights"].endswith(f"step_{STEPS:08d}")
    assert event["select"] == "ema"
    first, of_average = held_out_of(records(tmp_path))[0], held_out_of(records(alone))[-1]
    assert (first["weights"], of_average["weights"]) == ("model", "ema")
    assert first["psnr"] == pytest.approx(of_average["psnr"], rel=1e-6) and first["ssim"] == pytest.approx(of_average["ssim"], rel=1e-6)
    assert of_average["psnr"] != held_out_of(records(alone))[0]["psnr"]


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of LPIPS of VGG16, with random weights: of a size that keeps features' size (He's), and lin layers above 0."""
    folder = tmp_path_factory.mktemp("lpips")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in expected_shapes("vgg").items():
        std = (2 / torch.Size(shape[1:]).numel()) ** 0.5
        tensors[name] = torch.rand(shape, generator=generator) if "lin" in name else torch.randn(shape, generator=generator) * std
    save_file(tensors, folder / "vgg.safetensors")
    return folder


def test_hunyuan_s_is_trained_on_with_everything_at_once(pool: RankPool, clips: tuple[Path, Path], lpips: Path, tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    recipe, like = recipes.get_autoencoder("hunyuan_vae_finetune"), small(tmp_path / "run", clips, steps=2, batch_size=2)
    config = replace(
        like,
        recipe=recipe.recipe,
        autoencoder=recipe.autoencoder,
        loss=replace(recipe.loss, lpips=str(lpips)),
        discriminator=replace(recipe.discriminator, width=4, num_layers=2),
        data=replace(like.data, frame_counts=(5,), image_share=0.5, max_frame_interval=recipe.data.max_frame_interval),
        init=replace(recipe.init, weights=str(tmp_path / "vae")),
    )
    pool.run(2, train_on_rank, sharing(config, 2))
    ours = records(tmp_path / "run")
    assert len(ours) == 2
    for record in ours:
        assert record["lpips"] > 0 and record["kl"] > 0 and 0 < record["discriminator"] < 10 and record["discriminator_norm"] > 0
        # HunyuanVideo's paper: L1 + 0.1 LPIPS + 1e-6 KL; published scale: a frame's sum, a clip's sum of KL
        told = 3 * 32 * 32 * (record["pixels"] + 0.1 * record["lpips"]) + 1e-6 * record["kl"]
        assert record["loss"] == pytest.approx(told, rel=1e-6)


def refused(pool: RankPool, config: AutoencoderRunConfig) -> str:
    with pytest.raises(RankFailedError) as error:
        pool.run(1, train_on_rank, config)
    return str(error.value).strip().splitlines()[-1]


def test_what_cannot_be_is_refused_in_one_line(pool: RankPool, clips: tuple[Path, Path], alone: Path, tmp_path: Path) -> None:
    config = small(tmp_path / "run", clips)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLHunyuanVideo"}))
    cases = {
        "is of class AutoencoderKLHunyuanVideo": replace(config, init=replace(config.init, weights=str(other))),
        "holds no weights": replace(config, loss=replace(config.loss, lpips=str(other), lpips_weight=0.5)),
        "add --loss.lpips FOLDER": replace(config, loss=replace(config.loss, lpips_weight=0.5)),
        "takes 1 or 4k from 8 on frames": replace(config, data=replace(config.data, frame_counts=(33,))),
        "has no complete checkpoint": replace(config, init=replace(config.init, run=str(other))),
        "does not divide 1 rank(s)": sharing(config, 2),
        "has another discriminator": replace(small(alone, clips, steps=12), discriminator=replace(config.discriminator, width=8)),
        "less than 2 x 2 patches": replace(config, discriminator=replace(config.discriminator, num_layers=5)),
    }
    for said, case in cases.items():
        assert said in refused(pool, case)

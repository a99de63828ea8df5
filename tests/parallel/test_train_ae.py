"""An autoencoder's training in any number of ranks: a step's gradients, ten steps' curve, a restart, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megasora import recipes
from megasora.checkpoint.autoencoder import open_autoencoder
from megasora.checkpoint.autoencoder_export import export_autoencoder
from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.dc_ae import DCAEConfig
from megasora.config.schema import RecoveryConfig
from megasora.data.tiny_clips import make_tiny_clips
from megasora.diffusion.philox import Stream, key_of
from megasora.models.autoencoders.discriminator import ClipDiscriminator
from megasora.training.autoencoder.backward import ClipDraws, Losses, backward_clip
from megasora.training.autoencoder.network import new_network
from megasora.training.autoencoder.run import train_autoencoder
from tests.pool import RankFailedError, RankPool

SIZES = DCAEConfig(
    widths=(4, 8, 8),
    encoder_depths=(1, 1, 1),
    decoder_depths=(1, 1, 1),
    attention_from=2,
    temporal_stages=(0, 1),
    latent_channels=8,
    head_dim=4,
)
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
        evaluation=replace(config.evaluation, interval_steps=changes.pop("evaluate", 0), max_clips=2),
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


def gradients_on_rank(rank: int, adversarial: bool) -> dict[str, torch.Tensor]:
    """fp64 gradients of a step of four clips, one of them an image, summed over the ranks."""
    config = recipes.get_autoencoder("tiny_ae")
    network = new_network(replace(config.autoencoder, sizes=SIZES, spatial_compression=4), weights=None, load=True, seed=7)
    network.module.double()
    discriminator = ClipDiscriminator(width=4, num_layers=2, norm="clip", dropout=0.3)
    discriminator.initialize(seed=7)
    discriminator.double()
    losses_of = Losses(
        settings=config.loss,
        lpips=None,
        adversary=replace(config.discriminator, weight=0.5),
        discriminator=discriminator if adversarial else None,
    )
    world = dist.get_world_size()
    for sample in range(rank, 4, world):
        generator = torch.Generator().manual_seed(sample)
        video = torch.rand(3, 1 if sample == 2 else 8, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1
        draws = ClipDraws(posterior=0, patches=key_of(seed=1, stream=Stream.PATCHES, sample=sample))
        backward_clip(network, video, losses_of=losses_of, draws=draws, share=1 / 4)
    found = {}
    for name, parameter in (*network.module.named_parameters(), *discriminator.named_parameters(prefix="discriminator")):
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        dist.all_reduce(gradient)
        found[name] = gradient
    return found


@pytest.mark.parametrize("adversarial", [False, True])
def test_a_step_has_the_same_gradients_on_any_number_of_ranks(pool: RankPool, adversarial: bool) -> None:
    (alone,) = pool.run(1, gradients_on_rank, adversarial)
    assert any(gradient.norm() > 0 for name, gradient in alone.items() if name.startswith("discriminator")) == adversarial
    for ranks in (2, 3):
        together = pool.run(ranks, gradients_on_rank, adversarial)[0]
        for name, gradient in alone.items():
            assert (together[name] - gradient).norm() <= 1e-10 * max(gradient.norm().item(), 1e-12), name


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_tiny_clips(tmp_path_factory.mktemp("clips") / "made", num_clips=8, num_eval=2)


@pytest.fixture(scope="module")
def alone(pool: RankPool, clips: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps on one rank."""
    run_dir = tmp_path_factory.mktemp("alone")
    pool.run(1, train_on_rank, small(run_dir, clips, interval_steps=6, evaluate=5))
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


def test_a_run_goes_on_with_discriminator_and_optimizers_on_another_number_of_ranks(
    pool: RankPool, clips: tuple[Path, Path], alone: Path, tmp_path: Path
) -> None:
    pool.run(2, train_on_rank, small(tmp_path, clips, steps=6))
    pool.run(3, train_on_rank, small(tmp_path, clips))
    assert_same_curve(tmp_path, alone)
    (restart,) = [event for record in records(tmp_path) for event in record["events"] if event["event"] == "restart"]
    assert restart["step"] == 6


def test_held_out_clips_are_measured(alone: Path) -> None:
    events = [event for record in records(alone) for event in record["events"] if event["event"] == "reconstruct"]
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
    config = small(tmp_path, clips, steps=1, batch_size=1)
    pool.run(1, train_on_rank, replace(config, init=replace(config.init, run=str(alone))))
    (event,) = [event for event in records(tmp_path)[0]["events"] if event["event"] == "init"]
    assert event["weights"].endswith(f"step_{STEPS:08d}")
    assert event["select"] == "ema"


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
        "ranks cannot share a clip": replace(config, parallel=replace(config.parallel, context_parallel_size=2)),
        "has another discriminator": replace(small(alone, clips, steps=12), discriminator=replace(config.discriminator, width=8)),
        "less than 2 x 2 patches": replace(config, discriminator=replace(config.discriminator, num_layers=5)),
    }
    for said, case in cases.items():
        assert said in refused(pool, case)

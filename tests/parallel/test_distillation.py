"""Latent distillation in any number of ranks: a step's gradients, the curve across a restart, what a checkpoint keeps, what is refused."""

from __future__ import annotations

import shutil
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
from megasora.config.distillation import DistillationConfig
from megasora.config.schema import OptimizerConfig, ParallelConfig
from megasora.data.tiny_clips import make_tiny_clips
from megasora.models.autoencoders.discriminator import ClipDiscriminator
from megasora.models.autoencoders.teacher import make_tiny_teacher
from megasora.parallel import groups
from megasora.training.autoencoder.backward import ClipDraws, Losses, backward_clip
from megasora.training.autoencoder.checkpoints import AutoencoderCheckpoints
from megasora.training.autoencoder.network import new_network
from megasora.training.autoencoder.start import AutoencoderStart
from megasora.training.autoencoder.teaching import build_distillation
from megasora.training.autoencoder.trainer import build_autoencoder_trainee
from megasora.training.checkpoints import held_lease
from megasora.training.encode.settings import TeacherEncodeSettings
from megasora.training.encode.teacher import encode_teacher
from megasora.training.guard import Guard
from tests.parallel.test_train_ae import SIZES, records, small, train_on_rank
from tests.pool import RankFailedError, RankPool

STEPS, SAVED = 6, 3
NUMBERS = ("loss", "grad_norm", "cosine", "gram", "alignment_balance", "discriminator")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_tiny_clips(tmp_path_factory.mktemp("clips") / "made", num_clips=8, num_eval=2)


def settings_of(teacher: Path, **settings: Any) -> DistillationConfig:
    optimizer = OptimizerConfig(lr=5e-4, beta2=0.98, eps=1e-8, ema_decay=0.0)
    return DistillationConfig(weight=0.5, teacher=str(teacher), optimizer=optimizer, **{"layer": "stages.1", **settings})


def run_of(run_dir: Path, clips: tuple[Path, Path], teacher: Path, *, steps: int = STEPS, **settings: Any) -> AutoencoderRunConfig:
    config = small(run_dir, clips, steps=steps)
    return replace(config, discriminator=replace(config.discriminator, start_step=2), distillation=settings_of(teacher, **settings))


def gradients_on_rank(rank: int, teacher: Path) -> dict[str, torch.Tensor]:
    """fp64 gradients of a step of four clips, one of them an image, with a discriminator, summed over the ranks."""
    config = recipes.get_autoencoder("tiny_ae")
    config = replace(config, autoencoder=replace(config.autoencoder, sizes=SIZES, spatial_compression=4), distillation=settings_of(teacher))
    network = new_network(config.autoencoder, weights=None, load=True, seed=7)
    distillation = build_distillation(config, network, device=torch.device("cpu"), dtype=torch.float64)
    discriminator = ClipDiscriminator(width=4, num_layers=2, norm="clip", dropout=0.3)
    discriminator.initialize(seed=7)
    modules = {"autoencoder": network.module, "discriminator": discriminator, "projector": distillation.projector}
    for module in modules.values():
        module.double()
    adversary = replace(config.discriminator, weight=0.5)
    losses_of = Losses(settings=config.loss, lpips=None, adversary=adversary, discriminator=discriminator, distillation=distillation)
    for sample in range(rank, 4, dist.get_world_size()):
        generator = torch.Generator().manual_seed(sample)
        levels = torch.randint(256, (3, 1 if sample == 2 else 8, 16, 16), generator=generator, dtype=torch.uint8)
        backward_clip(network, levels, losses_of=losses_of, draws=ClipDraws(posterior=0, patches=sample), share=1 / 4)
    found = {}
    for name, parameter in ((f"{of}.{name}", parameter) for of, module in modules.items() for name, parameter in module.named_parameters()):
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        dist.all_reduce(gradient)
        found[name] = gradient
    return found


def test_a_step_has_the_same_gradients_on_any_number_of_ranks(pool: RankPool, teacher: Path) -> None:
    (alone,) = pool.run(1, gradients_on_rank, teacher)
    assert alone["projector.layers.0.weight"].norm() > 0
    for ranks in (2, 3):
        together = pool.run(ranks, gradients_on_rank, teacher)[0]
        for name, gradient in alone.items():
            assert (together[name] - gradient).norm() <= 1e-10 * max(gradient.norm().item(), 1e-12), name


@pytest.fixture(scope="module")
def alone(pool: RankPool, clips: tuple[Path, Path], teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on one rank."""
    run_dir = tmp_path_factory.mktemp("alone")
    pool.run(1, train_on_rank, run_of(run_dir, clips, teacher))
    return run_dir


def test_a_run_goes_on_with_its_projector_on_another_number_of_ranks(
    pool: RankPool, clips: tuple[Path, Path], teacher: Path, alone: Path, tmp_path: Path
) -> None:
    pool.run(2, train_on_rank, run_of(tmp_path, clips, teacher, steps=SAVED))
    pool.run(3, train_on_rank, run_of(tmp_path, clips, teacher))
    ours, theirs = records(tmp_path), records(alone)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs] == list(range(1, STEPS + 1))
    for now, was in zip(ours, theirs, strict=True):
        for name in NUMBERS:
            assert (was[name] is None) == (now[name] is None), (now["step"], name)
            if was[name] is not None:
                assert now[name] == pytest.approx(was[name], rel=1e-5, abs=1e-6), (now["step"], name)
    assert theirs[-1]["cosine"] < theirs[0]["cosine"]


def test_a_folder_of_it_has_no_projector_and_a_decoder_that_was_kept(
    pool: RankPool, clips: tuple[Path, Path], teacher: Path, alone: Path, tmp_path: Path
) -> None:
    checkpoint = alone / "checkpoints" / f"step_{STEPS:08d}"
    export_autoencoder(open_autoencoder(checkpoint, select="ema"), tmp_path / "before", target_format="dc-ae", prove=True)
    before = load_file(tmp_path / "before" / "model.safetensors")
    config = run_of(tmp_path / "run", clips, teacher, steps=1, trained="encoder")
    config = replace(config, discriminator=replace(config.discriminator, weight=0.0), init=replace(config.init, run=str(alone)))
    pool.run(1, train_on_rank, config)
    for select in ("model", "ema"):
        source = open_autoencoder(tmp_path / "run" / "checkpoints" / "step_00000001", select=select)  # type: ignore[arg-type]
        export_autoencoder(source, tmp_path / select, target_format="dc-ae", prove=True)
        after = load_file(tmp_path / select / "model.safetensors")
        assert after.keys() == before.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and all(name.startswith("encoder.") for name in changed)


def test_a_decoder_that_is_kept_is_measured_beside_the_encoders_average(
    pool: RankPool, clips: tuple[Path, Path], teacher: Path, tmp_path: Path
) -> None:
    """Before the first step the average is the weights: so are their figures."""
    found = []
    for weights in ("model", "ema"):
        config = run_of(tmp_path / weights, clips, teacher, steps=1, trained="encoder")
        evaluation = replace(config.evaluation, interval_steps=1, weights=weights)  # type: ignore[arg-type]
        pool.run(2, train_on_rank, replace(config, discriminator=replace(config.discriminator, weight=0.0), evaluation=evaluation))
        events = [event for record in records(tmp_path / weights) for event in record["events"] if event["event"] == "reconstruct"]
        found.append([event["psnr"] for event in events])
    of_weights, of_average = found
    assert of_average[0] == of_weights[0]
    assert of_average[1] != of_weights[1]


def kept_decoders_on_rank(rank: int, config: AutoencoderRunConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The decoder in fp32 as a bf16 run that keeps it begins, saves it, and has it when it goes on from there."""
    context = groups.initialize(ParallelConfig(), device=torch.device("cpu"), num_attention_heads=1, seed=0)
    root, start, guard = Path(str(config.run_dir)) / "checkpoints", AutoencoderStart(fresh=True), Guard(config.guard)
    root.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in (0, 1):  # the second is of other weights, until it resumes
        trainee = build_autoencoder_trainee(replace(config, init=replace(config.init, seed=seed)), context=context, start=start)
        kept = {"model": trainee.network.about, "distillation": {"trained": "encoder"}}
        with held_lease(root, take_over=False) as lease:
            checkpoints = AutoencoderCheckpoints(root, lease=lease, config=config, context=context, data_sha256="", kept=kept)
            if seed == 0:
                trainee.step = 1
                checkpoints.save(trainee, guard=guard)
            else:
                assert checkpoints.resume(trainee, guard=guard)
            checkpoints.close()
        found.append(dict(trainee.main.frozen))
        assert all(trainee.network.module.get_parameter(name).dtype == torch.bfloat16 for name in trainee.main.frozen)
    return found[0], found[1]


def test_a_bf16_run_keeps_a_decoder_that_is_not_trained_unrounded(
    pool: RankPool, clips: tuple[Path, Path], teacher: Path, tmp_path: Path
) -> None:
    config = run_of(tmp_path / "run", clips, teacher, trained="encoder")
    config = replace(config, precision=replace(config.precision, dtype="bf16"), discriminator=replace(config.discriminator, weight=0.0))
    saved, resumed = pool.run(2, kept_decoders_on_rank, config)[0]
    assert saved and all(name.startswith("decoder.") for name in saved)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in saved.values())
    assert all(torch.equal(saved[name], resumed[name]) for name in saved)
    for select in ("ema", "master", "model"):
        source = open_autoencoder(tmp_path / "run" / "checkpoints" / "step_00000001", select=select)  # type: ignore[arg-type]
        export_autoencoder(source, tmp_path / select, target_format="dc-ae", prove=True)
        written = load_file(tmp_path / select / "model.safetensors")
        wanted = {name: value.bfloat16() if select == "model" else value for name, value in saved.items()}
        assert all(torch.equal(written[name].to(value.dtype), value) for name, value in wanted.items())


@pytest.fixture(scope="module")
def cache(clips: tuple[Path, Path], teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of the run's clips, in shards of three."""
    folder = tmp_path_factory.mktemp("features") / "cache"
    config = cached(run_of(folder, clips, teacher), None)
    for task in (1, 0):  # as an array's
        result = encode_teacher(config, TeacherEncodeSettings(output=folder, samples_per_shard=3, shard=f"{task}/2"))
    assert (result.made, result.kept, result.failed, result.missing) == ((0, 2), (), 0, ())
    again = encode_teacher(config, TeacherEncodeSettings(output=folder, samples_per_shard=3, shard="0/1", verify=True))
    assert (again.made, again.kept, again.bytes_written) == ((), (0, 1, 2), 0)
    return folder


def cached(config: AutoencoderRunConfig, cache: Path | None, **settings: Any) -> AutoencoderRunConfig:
    """The run with clips that begin at their first frames, and features from a cache or from the teacher."""
    distillation = replace(config.distillation, cache=str(cache) if cache is not None else None, **settings)
    return replace(config, data=replace(config.data, temporal_start="first"), distillation=distillation)


def test_features_of_a_cache_are_those_that_the_teacher_gives_on_the_way(
    pool: RankPool, clips: tuple[Path, Path], teacher: Path, cache: Path, tmp_path: Path
) -> None:
    pool.run(1, train_on_rank, cached(run_of(tmp_path / "taught", clips, teacher), None))
    pool.run(1, train_on_rank, cached(run_of(tmp_path / "read", clips, teacher), cache, teacher=None))
    ours, theirs = records(tmp_path / "read"), records(tmp_path / "taught")
    assert [{name: record[name] for name in NUMBERS} for record in ours] == [{name: record[name] for name in NUMBERS} for record in theirs]
    assert sum(record["images"] for record in ours) > 0  # whose features are not the clips'


def test_a_clip_whose_features_are_damaged_is_skipped(
    pool: RankPool, clips: tuple[Path, Path], teacher: Path, cache: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(cache, tmp_path / "broken"))
    tar = broken / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[3000] ^= 1
    tar.write_bytes(content)
    pool.run(1, train_on_rank, cached(run_of(tmp_path / "run", clips, teacher, steps=3), broken))
    skips = [skip for record in records(tmp_path / "run") for event in record["events"] if event["event"] == "skip" for skip in [event]]
    assert len(skips) == 1
    assert "teacher's features: row" in str(skips[0])


def refused(pool: RankPool, config: AutoencoderRunConfig) -> str:
    with pytest.raises(RankFailedError) as error:
        pool.run(1, train_on_rank, config)
    return str(error.value).strip().splitlines()[-1]


def test_what_cannot_be_is_refused_in_one_line(
    pool: RankPool, clips: tuple[Path, Path], teacher: Path, alone: Path, cache: Path, tmp_path: Path
) -> None:
    other = make_tiny_teacher(tmp_path / "other", seed=1)
    half = Path(shutil.copytree(teacher, tmp_path / "half"))
    (half / "model.safetensors").unlink()
    part = Path(shutil.copytree(cache, tmp_path / "part"))
    (part / "shard-000002.json").unlink()
    going_on = {"steps": STEPS + 1}
    stretched = run_of(tmp_path / "run", clips, teacher)
    stretched = replace(stretched, data=replace(stretched.data, max_frame_interval=4))
    cases = {
        "does not load as Dinov2Model": run_of(tmp_path / "run", clips, half),
        "has another distillation (teacher=": run_of(alone, clips, other, **going_on),
        "has another distillation (layer=stages.1) than this run (layer=latent)": run_of(alone, clips, teacher, layer="latent", **going_on),
        "has another distillation": replace(run_of(alone, clips, teacher, **going_on), distillation=DistillationConfig()),
        "is no multiple of the teacher's patch": run_of(tmp_path / "run", clips, teacher, teacher_px=100),
        "teacher_sha256 is": cached(run_of(tmp_path / "run", clips, other), cache),
        "frames is mean in the cache and first in this run": cached(run_of(tmp_path / "run", clips, teacher, frames="first"), cache),
        "use --data.max_frame_interval 1": cached(stretched, cache),
        "use --data.temporal_start first": run_of(tmp_path / "run", clips, teacher, cache=str(cache)),
        "is no cache (cache.json": cached(run_of(tmp_path / "run", clips, teacher), other),
        "lacks 1 of its 3 shards (2;": cached(run_of(tmp_path / "run", clips, teacher), part),
    }
    for said, case in cases.items():
        assert said in refused(pool, case)

"""Training from a cache is training from clips: the same bits in every micro-batch, for every condition, in any layout."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megasora import recipes
from megasora.config.errors import UserError
from megasora.config.schema import ConditionConfig, RunConfig
from megasora.config.validate import raise_on_problems
from megasora.data.cache.reading import open_cache
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.data.decoding.writer import write_video
from megasora.data.manifest import read_manifest
from megasora.data.plan import SamplerState, next_step, plan_clips, request_of
from megasora.data.tiny_clips import PATTERNS, make_tiny_clips, manifest_row, write_manifest
from megasora.diffusion.conditions import draw_kind
from megasora.diffusion.philox import Stream, key_of, uniform
from megasora.models.encoders.bundle import PARTS, load_encoders
from megasora.models.encoders.tiny import make_tiny_encoders
from megasora.models.mmdit.schedule import MicroBatch
from megasora.parallel import groups
from megasora.training.encode.run import run_encode
from megasora.training.encode.settings import EncodeResult, EncodeSettings
from megasora.training.feed import Feeder
from megasora.training.prerequisites import encoders_needed, open_training_cache, refuse_missing_encoders
from tests.parallel.test_parity import layout
from tests.pool import RankFailedError, RankPool

STEPS = 4
BROKEN = 5
CONDITIONS = ConditionConfig(t2v=1.0, i2v_head=1.0, i2v_loop=1.0, i2v_tail=1.0, v2v_head=4.0, v2v_tail=4.0)


@dataclass(frozen=True, kw_only=True)
class Fed:
    """What a rank's feeder gave in a step."""

    digests: list[dict[str, str]]
    """By micro-batch."""
    counted: tuple[int, ...]
    skipped: tuple[tuple[str, str], ...]


def digests_of(batch: MicroBatch) -> dict[str, str]:
    tensors = {"target": batch.target, "weight": batch.weight}
    if batch.inputs is not None:
        tensors |= {name: getattr(batch.inputs, name) for name in ("img", "txt", "t", "y_vec", "cond")}
    bits = {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items() if tensor is not None}
    return {name: hashlib.sha256(content).hexdigest() for name, content in bits.items()}


def feed_on_rank(rank: int, config: RunConfig) -> list[Fed]:
    """The first steps of a run, as bits."""
    device = torch.device("cpu")
    context = groups.initialize(config.parallel, device=device, num_attention_heads=config.model.num_attention_heads, seed=config.init.seed)
    manifest = read_manifest(str(config.data.manifest))
    clips, _ = plan_clips(manifest.clips, data=config.data, encoders=config.encoders, model=config.model)
    cache = open_training_cache(config)
    parts = encoders_needed(config)
    hidden = {name: None for name in PARTS if name not in parts}  # what is not needed may not even be there
    feeder = Feeder(
        clips,
        config=config,
        context=context,
        encoders=load_encoders(replace(config.encoders, **hidden), model=config.model, device=device, parts=parts),
        decoder=PyAVDecoder(),
        state=SamplerState(),
        first_step=0,
        last_step=STEPS,
        dtype=torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32,
        cache=cache,
    )
    try:
        return [
            Fed(
                digests=[digests_of(batch) for batch in step.batches],
                counted=tuple(batch.num_counted for batch in step.batches),
                skipped=step.skipped,
            )
            for step in feeder
        ]
    finally:
        feeder.close()


def refusal_on_rank(rank: int, config: RunConfig) -> str:
    """Why the cache is refused."""
    with pytest.raises(UserError) as refused:
        open_training_cache(config)
    return str(refused.value)


def encode_on_rank(rank: int, config: RunConfig, settings: EncodeSettings) -> EncodeResult:
    """Encode with as many threads as the ranks that train: a convolution's bits may depend on it."""
    return run_encode(config, settings)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Ten tiny clips and two of 37 frames for v2v, one of them broken, and encoders."""
    folder = tmp_path_factory.mktemp("cached")
    manifest, _ = make_tiny_clips(folder / "clips", num_clips=10, num_eval=1)
    broken = folder / "clips" / f"clip{BROKEN:03d}.mp4"
    broken.write_bytes(broken.read_bytes()[:600])
    moving = torch.linspace(-1, 1, 37)[None, :, None, None] * torch.linspace(-1, 1, 64)[None, None, None, :]
    write_video(folder / "clips" / "long.mp4", moving.expand(3, 37, 64, 64), fps=12.0)
    lines = manifest.read_text().splitlines()
    row = manifest_row("long.mp4", PATTERNS[0][1], num_frames=37, height=64, width=64, fps=12.0)
    write_manifest(folder / "long.csv", [row, row])
    manifest.write_text("\n".join([*lines, *(folder / "long.csv").read_text().splitlines()[1:]]) + "\n")
    tiny = recipes.get("tiny")
    captions = [clip.text for clip in read_manifest(manifest).clips]
    encoders = make_tiny_encoders(folder / "encoders", captions=captions, model=tiny.model, base=tiny.encoders)
    return replace(
        tiny,
        device="cpu",
        encoders=encoders,
        condition=CONDITIONS,
        data=replace(tiny.data, manifest=str(manifest), frame_counts=(37, 17, 9, 1), global_tokens=700, dropout_t5=0.3, dropout_clip=0.3),
        evaluation=replace(tiny.evaluation, interval_steps=0),
        train=replace(tiny.train, seed=47),  # whose first steps draw every kind
    )


def in_bf16(config: RunConfig) -> RunConfig:
    return replace(config, encoders=replace(config.encoders, dtype="bf16"), precision=replace(config.precision, dtype="bf16"))


def encoded(pool: RankPool, config: RunConfig, folder: Path, **settings: Any) -> RunConfig:
    """The run on a cache of its clips."""
    (result,) = pool.run(1, encode_on_rank, config, EncodeSettings(output=folder, samples_per_shard=4, **settings))
    assert result.failed == (0 if settings.get("store") == "text" else 1)
    return replace(config, data=replace(config.data, cache=str(folder)))


@pytest.fixture(scope="module")
def cached(pool: RankPool, base: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The fp32 run on its cache; encoded for all conditions."""
    return encoded(pool, base, tmp_path_factory.mktemp("cache") / "fp32", conditions="all")


@pytest.fixture(scope="module")
def online(pool: RankPool, base: RunConfig) -> list[list[Fed]]:
    """The fp32 run without a cache, on one rank."""
    return pool.run(1, feed_on_rank, base)


def kinds_drawn(config: RunConfig) -> set[str]:
    """Conditions of the first steps' samples."""
    clips, _ = plan_clips(read_manifest(str(config.data.manifest)).clips, data=config.data, encoders=config.encoders, model=config.model)
    state, seed, kinds = SamplerState(), config.train.seed, set()
    for step in range(STEPS):
        plan = next_step([clip.tokens for clip in clips], state, seed=seed, global_tokens=config.data.global_tokens)
        for sample in plan.samples:
            key = key_of(seed=seed, stream=Stream.CONDITION, epoch=plan.epoch, sample=sample, step=step)
            kinds.add(draw_kind(asdict(config.condition), num_frames=clips[sample].num_frames, uniform=uniform(key=key)))
        state = plan.state_after
    return kinds


def assert_same_bits(ours: list[list[Fed]], theirs: list[list[Fed]]) -> None:
    for rank_ours, rank_theirs in zip(ours, theirs, strict=True):
        for one, other in zip(rank_ours, rank_theirs, strict=True):
            assert one.digests == other.digests
            assert one.counted == other.counted
            assert [clip for clip, _ in one.skipped] == [clip for clip, _ in other.skipped]


def test_a_cache_gives_the_bits_of_online_encoding(pool: RankPool, cached: RunConfig, online: list[list[Fed]]) -> None:
    assert kinds_drawn(cached) == {"t2v", "i2v_head", "i2v_loop", "i2v_tail", "v2v_head", "v2v_tail"}
    ours = pool.run(1, feed_on_rank, cached)
    assert_same_bits(ours, online)
    skips = [skip for fed in ours[0] for skip in fed.skipped]
    assert skips
    assert all(clip == str(BROKEN) and "failed when it was encoded" in reason and "clip005" in reason for clip, reason in skips)


def drawing(config: RunConfig) -> RunConfig:
    return replace(config, encoders=replace(config.encoders, posterior="sample"))


def test_a_bf16_cache_gives_the_bits_of_online_encoding_for_mean_and_sample(pool: RankPool, base: RunConfig, tmp_path: Path) -> None:
    stored = encoded(pool, in_bf16(base), tmp_path / "bf16")
    means, samples = pool.run(1, feed_on_rank, stored), pool.run(1, feed_on_rank, drawing(stored))
    assert_same_bits(means, pool.run(1, feed_on_rank, in_bf16(base)))
    assert_same_bits(samples, pool.run(1, feed_on_rank, drawing(in_bf16(base))))
    assert all(mean["img"] != drawn["img"] for mean, drawn in zip(means[0][0].digests, samples[0][0].digests, strict=True))


def test_ranks_share_out_the_reads_and_get_the_same_bits(pool: RankPool, base: RunConfig, cached: RunConfig) -> None:
    shared = {"parallel": layout(tp=2, cp=2)}
    ours = pool.run(4, feed_on_rank, drawing(replace(cached, **shared)))
    assert_same_bits(ours, pool.run(4, feed_on_rank, drawing(replace(base, **shared))))


@pytest.mark.parametrize("store", ["text", "latents"])
def test_half_a_cache_gives_the_same_bits(pool: RankPool, base: RunConfig, online: list[list[Fed]], tmp_path: Path, store: str) -> None:
    config = encoded(pool, base, tmp_path / "half", store=store)
    assert encoders_needed(config) == (("vae",) if store == "text" else ("t5", "clip"))
    assert_same_bits(pool.run(1, feed_on_rank, config), online)


def test_one_stored_sample_is_what_every_epoch_sees(pool: RankPool, base: RunConfig, online: list[list[Fed]], tmp_path: Path) -> None:
    config = encoded(pool, base, tmp_path / "sampled", latents="sampled")
    with pytest.raises(RankFailedError, match="holds one sample of each latent, encoders.posterior is mean"):
        pool.run(1, feed_on_rank, config)
    (ours,) = pool.run(1, feed_on_rank, drawing(config))
    assert [fed.counted for fed in ours] == [fed.counted for fed in online[0]]
    for one, other in zip(ours, online[0], strict=True):
        for stored, fresh in zip(one.digests, other.digests, strict=True):
            assert stored["txt"] == fresh["txt"]
            assert stored["img"] != fresh["img"]


def test_a_cache_holds_one_drawn_start_of_each_clip(pool: RankPool, base: RunConfig, tmp_path: Path) -> None:
    """Of 25 frames a clip of 9 may begin at 17; the cache has the frames from the one drawn by seed and sample."""
    drawing_starts = replace(base, data=replace(base.data, temporal_start="random", frame_counts=(9,)))
    config = encoded(pool, drawing_starts, tmp_path / "random")
    clips, _ = plan_clips(read_manifest(str(config.data.manifest)).clips, data=config.data, encoders=config.encoders, model=config.model)
    vae, cache, offsets = (
        load_encoders(config.encoders, model=config.model, device=torch.device("cpu")).vae,
        open_cache(tmp_path / "random"),
        [],
    )
    for sample, clip in enumerate(clips):
        if clip.clip.row == BROKEN:
            continue
        offset = int(uniform(key=key_of(seed=config.train.seed, stream=Stream.START, sample=sample)) * (clip.clip.num_frames - 9 + 1))
        video = PyAVDecoder().decode(request_of(clip, offset=offset))
        torch.testing.assert_close(cache.read(sample, slice(0, 1))["mean"], vae.posterior(video).mean, rtol=1e-3, atol=1e-4)
        offsets.append(offset)
    assert len(set(offsets)) > 3
    (fed,) = pool.run(1, feed_on_rank, config)
    assert len(fed) == STEPS
    with pytest.raises(RankFailedError, match="temporal_start is random in the cache and first"):
        pool.run(1, feed_on_rank, replace(config, data=replace(config.data, temporal_start="first")))


def copied(config: RunConfig, folder: Path) -> RunConfig:
    shutil.copytree(str(config.data.cache), folder)
    return replace(config, data=replace(config.data, cache=str(folder)))


def test_a_damaged_sample_costs_its_weight(pool: RankPool, cached: RunConfig, tmp_path: Path) -> None:
    config = copied(cached, tmp_path / "cache")
    index = np.load(tmp_path / "cache" / "shard-000000.index.npy")
    with (tmp_path / "cache" / "shard-000000.tar").open("r+b") as tar:
        tar.seek(int(index["offset"][2, 0]) + 5000)
        byte = tar.read(1)[0]
        tar.seek(-1, 1)
        tar.write(bytes([byte ^ 16]))
    (whole,), (damaged,) = pool.run(1, feed_on_rank, cached), pool.run(1, feed_on_rank, config)
    lost = [skip for fed in damaged for skip in fed.skipped if skip[0] != str(BROKEN)]
    assert lost
    assert all(clip == "2" and "row 2 in shard-000000.tar is damaged (checksum)" in reason for clip, reason in lost)
    assert sum(sum(fed.counted) for fed in damaged) == sum(sum(fed.counted) for fed in whole) - len(lost)


def test_a_missing_shard_is_refused_at_the_start(pool: RankPool, cached: RunConfig, tmp_path: Path) -> None:
    config = copied(cached, tmp_path / "cache")
    (tmp_path / "cache" / "shard-000002.json").unlink()
    first, second = pool.run(2, refusal_on_rank, config)
    assert "lacks 1 of its 3 shards (2; shard-000002.json is missing); run megasora data encode" in first
    assert second == first


def with_clips(config: RunConfig, folder: Path) -> RunConfig:
    other = folder / "train.csv"
    other.write_text(Path(str(config.data.manifest)).read_text() + "\n")
    return replace(config, data=replace(config.data, manifest=str(other)))


def test_a_cache_of_something_else_is_refused_with_what_differs(pool: RankPool, base: RunConfig, cached: RunConfig, tmp_path: Path) -> None:
    data, encoders = cached.data, cached.encoders
    weights = tmp_path / "vae"
    shutil.copytree(str(encoders.vae), weights)
    (weights / "config.json").write_text((weights / "config.json").read_text().replace('"scaling_factor": ', '"scaling_factor": 1'))
    narrow = encoded(pool, replace(base, condition=ConditionConfig(i2v_head=1.0)), tmp_path / "narrow")
    for config, message in (
        (replace(cached, data=replace(data, text_tokens=8)), "text_tokens is 16 in the cache and 8 in this run"),
        (replace(cached, data=replace(data, frame_counts=(17, 1))), r"frame_counts is \[37, 17, 9, 1\] in the cache and \[17, 1\]"),
        (replace(cached, data=replace(data, target_fps=6.0)), "target_fps is 24.0 in the cache and 6.0"),
        (replace(cached, data=replace(data, resolution="manifest")), "resolution is 64px in the cache and manifest"),
        (replace(cached, data=replace(data, temporal_start="random")), "temporal_start is first in the cache and random"),
        (replace(cached, data=replace(data, buckets="published")), "buckets is nearest in the cache and published"),
        (replace(cached, encoders=replace(encoders, dtype="bf16")), "dtype is fp32 in the cache and bf16"),
        (replace(cached, encoders=replace(encoders, vae=str(weights))), "encoders.vae has the hash"),
        (with_clips(cached, tmp_path), "manifest_sha256 is"),
        (replace(narrow, condition=CONDITIONS), "lacks the frames of i2v_loop, i2v_tail, v2v_head, v2v_tail .*--conditions all"),
        (replace(cached, data=replace(data, cache=str(tmp_path))), "is no cache"),
    ):
        with pytest.raises(RankFailedError, match=message):
            pool.run(1, feed_on_rank, config)


def test_encoders_are_needed_only_for_what_is_not_cached(cached: RunConfig) -> None:
    bare = replace(cached, recipe="other", encoders=replace(cached.encoders, vae=None, t5=None, clip=None))
    assert encoders_needed(bare) == ()
    refuse_missing_encoders(bare)
    shown = replace(bare, evaluation=replace(bare.evaluation, sample_interval_steps=10, sample_prompts=("a",)))
    with pytest.raises(UserError, match=r"sample clips need encoders .*--encoders.vae FOLDER .*--evaluation.sample_interval_steps 0"):
        raise_on_problems(shown, world_size=1)
    with pytest.raises(UserError, match=r"evaluation needs more: add --encoders.vae FOLDER"):
        refuse_missing_encoders(shown)
    measured = replace(
        bare, data=replace(bare.data, eval_manifest=bare.data.manifest), evaluation=replace(bare.evaluation, interval_steps=10)
    )
    with pytest.raises(UserError, match=r"held-out loss needs encoders .*--evaluation.interval_steps 0"):
        raise_on_problems(measured, world_size=1)
    raise_on_problems(bare, world_size=1)

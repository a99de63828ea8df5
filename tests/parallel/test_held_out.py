"""The held-out loss: encoded as training encodes, from fixed draws, the same every time and in every layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch

from megasora import recipes
from megasora.config.schema import ConditionConfig, RunConfig
from megasora.data.cache.layout import caption_of
from megasora.data.decoding.contract import DecodeError
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.data.manifest import read_manifest
from megasora.data.plan import plan_clips, request_of, start_of
from megasora.data.tiny_clips import make_tiny_clips
from megasora.diffusion.patchify import patchify
from megasora.diffusion.philox import Stream, key_of, uniform
from megasora.models.encoders.bundle import load_encoders
from megasora.models.encoders.tiny import make_tiny_encoders
from megasora.models.mmdit.build import build_chunks
from megasora.models.mmdit.initialization import initialize_weights
from megasora.parallel import groups
from megasora.training.evaluation import EVAL_SEED, Evaluator, HeldOutLoss
from tests.parallel.runs import smaller
from tests.parallel.test_parity import layout
from tests.pool import RankPool


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a rank's evaluator holds and measures."""

    losses: tuple[HeldOutLoss, HeldOutLoss]
    """Of two evaluations."""
    with_all_weights: HeldOutLoss | None
    """Without the zeros that cond_in, the final layer and others start from; where it was asked for."""
    as_by_hand: bool
    """Whether every clip's tensors are, bit for bit, those that decoder and encoders give when called one after another."""
    failed: tuple[str, ...]


def measure_on_rank(rank: int, config: RunConfig, all_weights: bool = False) -> Measured:
    """Evaluate an untrained model twice, and once more with all weights."""
    device = torch.device("cpu")
    context = groups.initialize(config.parallel, device=device, num_attention_heads=config.model.num_attention_heads, seed=config.init.seed)
    manifest = read_manifest(str(config.data.eval_manifest))
    clips, _ = plan_clips(manifest.clips, data=config.data, encoders=config.encoders, model=config.model)
    encoders = load_encoders(config.encoders, model=config.model, device=device)
    chunks, megatron_config = build_chunks(config.model, config.parallel, config.precision, context=context)
    initialize_weights(chunks, model=config.model, context=context, seed=config.init.seed)
    decoder = PyAVDecoder()
    evaluator = Evaluator(clips, config=config, context=context, encoders=encoders, decoder=decoder, dtype=torch.float32)

    def by_hand(number: int) -> tuple[torch.Tensor, ...]:
        clip = clips[number]
        key = key_of(seed=EVAL_SEED, stream=Stream.START, sample=number)
        offset = start_of(clip, uniform=uniform(key=key)) if config.data.temporal_start == "random" else 0
        posterior = encoders.vae.posterior(decoder.decode(request_of(clip, offset=offset)))
        drawn = posterior.sample(key=key_of(seed=EVAL_SEED, stream=Stream.VAE, sample=number))
        latent = (drawn if config.encoders.posterior == "sample" else posterior.mean) * encoders.vae.scaling_factor
        text, vec = encoders.encode_text([caption_of(clip)], max_tokens=clip.text_tokens)
        return patchify(latent, patch=config.model.patch_size), text[0], vec[0]

    losses = (evaluator.measure(chunks, megatron_config), evaluator.measure(chunks, megatron_config))
    if all_weights:
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    if not parameter.any():  # cond_in and the final layer among them
                        parameter.normal_(generator=torch.Generator().manual_seed(0))
    return Measured(
        losses=losses,
        with_all_weights=evaluator.measure(chunks, megatron_config) if all_weights else None,
        as_by_hand=all(
            all(torch.equal(one, other) for one, other in zip((held.tokens, held.text, held.vec), by_hand(held.number), strict=True))
            for held in evaluator.held_out
        ),
        failed=tuple(clip for clip, _ in evaluator.failed),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Five held-out clips, the second broken, and encoders."""
    folder = tmp_path_factory.mktemp("held_out")
    _, manifest = make_tiny_clips(folder / "clips", num_clips=1, num_eval=5)
    broken = folder / "clips" / "clip002.mp4"
    broken.write_bytes(broken.read_bytes()[:600])
    tiny = recipes.get("tiny")
    tiny = replace(tiny, model=smaller(tiny.model))
    captions = [clip.text for clip in read_manifest(manifest).clips]
    encoders = make_tiny_encoders(folder / "encoders", captions=captions, model=tiny.model, base=tiny.encoders)
    return replace(tiny, device="cpu", encoders=encoders, data=replace(tiny.data, eval_manifest=str(manifest), temporal_start="random"))


@pytest.fixture(scope="module")
def alone(pool: RankPool, run: RunConfig) -> dict[str, Measured]:
    """What one rank measures, by posterior."""
    return {name: pool.run(1, measure_on_rank, with_posterior(run, name))[0] for name in ("mean", "sample")}


def with_posterior(run: RunConfig, posterior: str) -> RunConfig:
    return replace(run, encoders=replace(run.encoders, posterior=posterior))  # type: ignore[arg-type]


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_every_evaluation_in_every_layout_gives_the_same_held_out_loss(
    pool: RankPool, run: RunConfig, alone: dict[str, Measured], posterior: str
) -> None:
    config, one = with_posterior(run, posterior), alone[posterior]
    assert one.losses[0] == one.losses[1]
    assert one.as_by_hand
    assert one.failed == ("1",)
    for size, parallel in ((4, layout(tp=2, cp=2)), (2, layout())):
        for other in pool.run(size, measure_on_rank, replace(config, parallel=parallel)):
            assert other.losses[0] == other.losses[1]
            for part in ("by_t", "by_kind", "by_resolution"):
                assert getattr(other.losses[0], part) == pytest.approx(getattr(one.losses[0], part), rel=1e-5)
            assert other.as_by_hand


def measure_without_a_clip_on_one_rank(rank: int, config: RunConfig) -> Measured:
    """A file system that fails one rank alone, at its third clip."""
    real = PyAVDecoder.pixels

    def failing(decoder: PyAVDecoder, request: Any) -> Any:
        if rank == 1 and "clip003" in str(request.path):
            raise DecodeError("gone for a moment")
        return real(decoder, request)

    with mock.patch.object(PyAVDecoder, "pixels", failing):
        return measure_on_rank(rank, config)


def test_a_clip_that_one_rank_cannot_decode_is_left_out_by_all(pool: RankPool, run: RunConfig, alone: dict[str, Measured]) -> None:
    found = pool.run(2, measure_without_a_clip_on_one_rank, run)
    assert [one.failed for one in found] == [("1", "2")] * 2
    assert found[0].losses[0] == found[1].losses[0]
    assert found[0].as_by_hand and found[1].as_by_hand  # the clips after it keep their noise
    assert found[0].losses[0] != alone["sample"].losses[0]


def test_given_frames_are_what_tells_kinds_apart(pool: RankPool, run: RunConfig) -> None:
    # of 17, 9 and 1 frames; a still has no kind but t2v, and clips of 34 frames for v2v there are none
    config = replace(run, condition=ConditionConfig(t2v=0.0, i2v_head=1.0, i2v_loop=2.0, v2v_head=1.0))
    (one,) = pool.run(1, measure_on_rank, config, True)
    blind, measured = one.losses[0], one.with_all_weights
    assert measured is not None
    assert list(measured.by_kind) == ["t2v", "i2v_head", "i2v_loop"]
    assert measured.by_kind["t2v"] == pytest.approx(measured.mean) == pytest.approx(measured.by_resolution["64px"])
    videos = {kind: loss for kind, loss in blind.by_kind.items() if kind != "t2v"}
    assert videos["i2v_head"] == pytest.approx(videos["i2v_loop"], rel=1e-6)  # a model that is blind to given frames
    assert measured.by_kind["i2v_head"] != pytest.approx(measured.by_kind["i2v_loop"], rel=1e-6)


def test_the_posterior_setting_reaches_the_held_out_loss(alone: dict[str, Measured]) -> None:
    mean, drawn = alone["mean"].losses[0], alone["sample"].losses[0]
    assert all(drawn.by_t[t] != mean.by_t[t] for t in mean.by_t)

"""What the feed draws for each sample, against the definitions: streams and keys, times, dropped text, latents, condition, weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megasora import recipes
from megasora.config.schema import ConditionConfig, RunConfig
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.data.manifest import read_manifest
from megasora.data.plan import PlannedClip, SamplerState, StepPlan, assign_packs, plan_clips, request_of
from megasora.data.tiny_clips import make_tiny_clips
from megasora.diffusion.patchify import unpatchify
from megasora.diffusion.philox import Stream, key_of, normal_at
from megasora.models.encoders.bundle import Encoders, load_encoders
from megasora.models.encoders.tiny import make_tiny_encoders
from megasora.models.mmdit.schedule import MicroBatch
from megasora.parallel import groups
from megasora.perf.flops import training_flops
from megasora.training.feed import Feeder
from tests.parallel.runs import metrics, train_on_rank
from tests.parallel.test_parity import layout
from tests.pool import RankPool

STEPS = 6
BROKEN = 2
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Fed:
    """One step on one rank."""

    plan: StepPlan
    batches: list[MicroBatch]
    skipped: tuple[tuple[str, str], ...]
    pad_share: float


def planned(config: RunConfig) -> tuple[PlannedClip, ...]:
    clips = read_manifest(str(config.data.manifest)).clips
    return plan_clips(clips, data=config.data, encoders=config.encoders, model=config.model)[0]


def feed_on_rank(rank: int, config: RunConfig, steps: int) -> list[Fed]:
    """The first steps of a run on one rank, whole."""
    context = groups.initialize(config.parallel, device=CPU, num_attention_heads=config.model.num_attention_heads, seed=0)
    feeder = Feeder(
        planned(config),
        config=config,
        context=context,
        encoders=load_encoders(config.encoders, model=config.model, device=CPU),
        decoder=PyAVDecoder(),
        state=SamplerState(),
        first_step=0,
        last_step=steps,
        dtype=torch.float32,
    )
    try:
        return [Fed(plan=s.plan, batches=s.batches, skipped=s.skipped, pad_share=s.balance.pad_share) for s in feeder]
    finally:
        feeder.close()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Six clips of at most 9 frames, one broken; two fit a step of four packs."""
    folder = tmp_path_factory.mktemp("draws")
    manifest, _ = make_tiny_clips(folder / "clips", num_clips=6, num_eval=1)
    broken = folder / "clips" / f"clip{BROKEN:03d}.mp4"
    broken.write_bytes(broken.read_bytes()[:600])
    tiny = recipes.get("tiny")
    captions = [clip.text for clip in read_manifest(manifest).clips]
    encoders = make_tiny_encoders(folder / "encoders", captions=captions, model=tiny.model, base=tiny.encoders)
    data = replace(
        tiny.data,
        manifest=str(manifest),
        frame_counts=(9,),
        global_tokens=140,
        num_microbatches=4,
        temporal_start="random",
        dropout_t5=0.6,
        dropout_clip=0.25,
    )
    return replace(
        tiny,
        device="cpu",
        encoders=replace(encoders, posterior="sample"),
        condition=ConditionConfig(t2v=1.0, i2v_head=1.0, i2v_loop=1.0, i2v_tail=1.0),
        data=data,
        evaluation=replace(tiny.evaluation, interval_steps=0),
        train=replace(tiny.train, steps=1, tensorboard=False),
    )


@pytest.fixture(scope="module")
def fed(pool: RankPool, config: RunConfig) -> list[Fed]:
    (steps,) = pool.run(1, feed_on_rank, config, STEPS)
    return steps


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A sample of a step with its micro-batch of one sample."""

    number: int
    """Among the planned clips."""
    clip: PlannedClip
    batch: MicroBatch
    epoch: int
    step: int

    def key(self, stream: Stream) -> int:
        return key_of(seed=recipes.get("tiny").train.seed, stream=stream, epoch=self.epoch, sample=self.number, step=self.step)

    def uniform(self, stream: Stream) -> float:
        """53 bits of element 0; the normal of the same block has the radius sqrt(-2 log u)."""
        u, v = normal_at(torch.arange(2), key=self.key(stream), dtype=torch.float64).tolist()
        return math.exp(-(u**2 + v**2) / 2)

    def normal(self, stream: Stream, *shape: int, first: int = 0) -> Tensor:
        return normal_at(torch.arange(first, first + math.prod(shape)), key=self.key(stream)).view(shape)


@pytest.fixture(scope="module")
def samples(config: RunConfig, fed: list[Fed]) -> list[Drawn]:
    """Every sample that could be decoded."""
    clips, found = planned(config), []
    for step, one in enumerate(fed):
        tokens = [clips[sample].tokens for sample in one.plan.samples]
        (packs,) = assign_packs(tokens, data_parallel_size=1, num_microbatches=4, hidden_size=config.model.hidden_size)
        for pack, batch in zip(packs, one.batches, strict=True):
            for place in pack:
                assert len(pack) == 1, "fewer samples than packs: each has its own"
                number = one.plan.samples[place]
                if number != BROKEN:
                    found.append(Drawn(number=number, clip=clips[number], batch=batch, epoch=one.plan.epoch, step=step))
    assert {sample.epoch for sample in found} == {0, 1}
    return found


def test_times_are_shifted_logit_normals_of_their_own_stream(samples: list[Drawn]) -> None:
    for sample in samples:
        assert sample.batch.inputs is not None
        frames, height, width = sample.clip.grid[0], sample.clip.height // 8, sample.clip.width // 8
        shift = (1 + (height * width // 4 - 256) * (3 - 1) / (4096 - 256)) * math.sqrt(frames)
        t = 1 / (1 + math.exp(-float(sample.normal(Stream.TIMESTEP, 1))))
        assert sample.batch.inputs.t.item() == pytest.approx(shift * t / (1 + (shift - 1) * t), rel=1e-6)


def test_text_and_vector_are_dropped_by_streams_and_rates_of_their_own(samples: list[Drawn], config: RunConfig) -> None:
    encoders = load_encoders(config.encoders, model=config.model, device=CPU)
    (null_text,), (null_vec,) = encoders.encode_text([""], max_tokens=config.data.text_tokens)
    dropped = []
    for sample in samples:
        assert sample.batch.inputs is not None
        text = torch.allclose(sample.batch.inputs.txt, null_text, atol=1e-5)
        vec = torch.allclose(sample.batch.inputs.y_vec[0], null_vec, atol=1e-5)
        assert text == (sample.uniform(Stream.DROPOUT_T5) < 0.6)
        assert vec == (sample.uniform(Stream.DROPOUT_CLIP) < 0.25)
        dropped.append((text, vec))
    assert {(True, False), (False, False)} <= set(dropped)


def posterior_draw(sample: Drawn, encoders: Encoders, video: Tensor, *, first: int) -> Tensor:
    posterior = encoders.vae.posterior(video)
    noise = sample.normal(Stream.VAE, *posterior.mean.shape, first=first)
    return (posterior.mean + posterior.std * noise) * encoders.vae.scaling_factor


def test_latents_and_given_frames_are_scaled_draws_of_their_posteriors(samples: list[Drawn], config: RunConfig) -> None:
    encoders = load_encoders(config.encoders, model=config.model, device=CPU)
    frames_of = {0: (), 1: (0,), 2: (0, 8), 3: (8,)}  # t2v, head, loop and tail at equal weights
    kinds, offsets = set(), set()
    for sample in samples:
        batch = sample.batch
        assert batch.inputs is not None and batch.inputs.cond is not None and batch.target is not None
        starts = sample.clip.clip.num_frames - 9 + 1
        offset = int(sample.uniform(Stream.START) * starts)
        offsets.add(offset)
        video = PyAVDecoder().decode(request_of(sample.clip, offset=offset))
        noise = sample.normal(Stream.NOISE, *batch.target.shape)
        # the target is (1 - sigma) x_1 - x_0
        x_0 = unpatchify((1 - 1e-5) * noise - batch.target, grid=sample.clip.grid, patch=2)
        torch.testing.assert_close(x_0, posterior_draw(sample, encoders, video, first=0), rtol=1e-3, atol=1e-4)
        t = batch.inputs.t.item()
        torch.testing.assert_close(batch.inputs.img, t * noise + (1 - t) * ((1 - 1e-5) * noise - batch.target), rtol=1e-3, atol=1e-4)
        condition = torch.zeros(1 + len(x_0), *x_0.shape[1:])
        kind = min(3, int(4 * sample.uniform(Stream.CONDITION)))
        first = x_0.numel()
        for frame in frames_of[kind]:
            drawn = posterior_draw(sample, encoders, video[:, frame : frame + 1], first=first)
            condition[0, frame // 4], condition[1:, frame // 4] = 1, drawn[:, 0]
            first += drawn.numel()
        torch.testing.assert_close(unpatchify(batch.inputs.cond, grid=sample.clip.grid, patch=2), condition, rtol=1e-3, atol=1e-4)
        kinds.add(kind)
    assert kinds == {0, 1, 2, 3}
    assert len(offsets) > 3


def test_broken_clips_and_empty_packs_weigh_nothing(samples: list[Drawn], fed: list[Fed]) -> None:
    for sample in samples:
        assert sample.batch.weight is not None and sample.batch.num_counted == 1
        assert float(sample.batch.weight.sum()) * 64 == pytest.approx(1.0)  # 1 / (tokens x 64 channels) on each token
    used = {id(sample.batch) for sample in samples}
    others = [batch for one in fed for batch in one.batches if id(batch) not in used]
    assert len(others) == 4 * STEPS - len(samples)
    assert all(batch.num_counted == 0 and batch.weight is not None and not batch.weight.any() for batch in others)
    broken = [step for step, one in enumerate(fed) if BROKEN in one.plan.samples]
    assert broken and [step for step, one in enumerate(fed) if one.skipped] == broken
    assert all(one.pad_share == 0 for one in fed)  # one rank pads nothing


def test_an_epoch_that_takes_no_clip_is_passed_over(pool: RankPool, config: RunConfig) -> None:
    """Of a few clips a mix may take none; the step is made of the next epoch that takes one."""
    rare = replace(config, data=replace(config.data, video_weight=0.05, frame_counts=(9,), num_microbatches=1))
    (steps,) = pool.run(1, feed_on_rank, rare, 3)
    assert all(step.plan.samples for step in steps)
    assert len({step.plan.epoch for step in steps}) == 3 and steps[-1].plan.epoch > 3


def test_no_pack_holds_more_than_it_may(pool: RankPool, config: RunConfig, fed: list[Fed]) -> None:
    data = replace(config.data, num_microbatches=1, max_pack_tokens=100)
    (steps,) = pool.run(1, feed_on_rank, replace(config, data=data), 2)
    for limited, free in zip(steps, fed, strict=False):
        assert limited.plan == free.plan
        assert [batch.pack.text_length + batch.pack.video_length <= 100 for batch in limited.batches] == [True, True]


def test_the_first_loss_is_the_mean_square_of_the_target_over_samples(
    pool: RankPool, config: RunConfig, fed: list[Fed], tmp_path: Path
) -> None:
    # modulations and the last layer start at zero, so an untrained model says 0 everywhere
    pool.run(2, train_on_rank, replace(config, run_dir=str(tmp_path / "run"), parallel=layout()))
    (record,) = metrics(tmp_path / "run")
    total = sum(float((b.target.square().sum(1) * b.weight).sum()) for b in fed[0].batches if b.target is not None and b.weight is not None)
    counted = sum(batch.num_counted for batch in fed[0].batches)
    assert (record["samples"], record["loss"]) == (counted, pytest.approx(total / counted, rel=1e-4))
    clips = planned(config)
    flops = training_flops([clips[s].tokens for s in fed[0].plan.samples], hidden_size=128, num_blocks=8)
    assert record["tflops_per_gpu"] * 2 * record["step_time_s"] * 1e12 == pytest.approx(flops)

"""Which samples an epoch takes when classes and media have weights, and packs under a memory limit."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasora.config.errors import UserError
from megasora.config.schema import DataConfig, EncodersConfig, ModelConfig
from megasora.data.manifest import Clip
from megasora.data.plan import PlannedClip, SamplerState, assign_packs, epoch_order, mix_of, next_step, plan_clips, sample_cost

MODEL, ENCODERS = ModelConfig(), EncodersConfig()


def clip(row: int, *, frames: int = 33, height: int = 768, width: int = 768) -> Clip:
    return Clip(id=str(row), path=f"{row}.mp4", text="", num_frames=frames, height=height, width=width, fps=24.0, row=row)


def planned(clips: list[Clip], data: DataConfig) -> tuple[PlannedClip, ...]:
    return plan_clips(clips, data=data, encoders=ENCODERS, model=MODEL)[0]


def test_without_weights_an_epoch_is_the_plain_permutation() -> None:
    data = DataConfig()
    samples = planned([clip(row) for row in range(20)], data)
    assert mix_of(samples, data) is None
    assert sorted(epoch_order(20, seed=0, epoch=0).tolist()) == list(range(20))


def test_each_clip_is_taken_once_at_one_of_its_classes() -> None:
    data = DataConfig(resolution_mix=(("768px", 1.0), ("256px", 3.0)))
    samples = planned([clip(row) for row in range(2000)], data)
    assert len(samples) == 4000 and {sample.resolution for sample in samples[:2]} == {"256px", "768px"}
    order = epoch_order(len(samples), seed=1, epoch=0, mix=mix_of(samples, data))
    assert Counter(samples[number].clip.row for number in order) == dict.fromkeys(range(2000), 1)
    shares = Counter(samples[number].resolution for number in order)
    assert abs(shares["256px"] / 2000 - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 2000)
    again = epoch_order(len(samples), seed=1, epoch=1, mix=mix_of(samples, data))
    assert any(a != b for a, b in zip(sorted(order), sorted(again), strict=True))  # another epoch, other classes


def test_a_small_clip_is_not_enlarged() -> None:
    data = DataConfig(resolution_mix=(("768px", 1.0), ("256px", 1.0)))
    samples = planned([clip(0, height=480, width=640), clip(1, height=144, width=176), clip(2, height=1080, width=1920)], data)
    assert [(sample.clip.row, sample.resolution) for sample in samples] == [(0, "256px"), (1, "256px"), (2, "256px"), (2, "768px")]


def test_images_and_videos_are_taken_as_often_as_their_weights_say() -> None:
    data = DataConfig(image_weight=2.5, video_weight=0.5)
    samples = planned([clip(row, frames=1 if row % 2 else 33) for row in range(4000)], data)
    order = epoch_order(len(samples), seed=0, epoch=3, mix=mix_of(samples, data))
    counts = Counter(order.tolist())
    images, videos = [counts[row] for row in range(1, 4000, 2)], [counts[row] for row in range(0, 4000, 2)]
    assert set(images) == {2, 3} and set(videos) == {0, 1}
    assert abs(np.mean(images) - 2.5) < 0.05 and abs(np.mean(videos) - 0.5) < 0.05


def test_weights_that_leave_nothing_are_refused() -> None:
    data = DataConfig(video_weight=0.0)
    with pytest.raises(UserError, match="leave no clip"):
        mix_of(planned([clip(0)], data), data)


@given(st.integers(0, 2**32), st.integers(1, 6), st.floats(0.1, 3.0), st.floats(0.1, 3.0))
@settings(max_examples=200, deadline=None)
def test_a_mixed_epoch_resumes_from_any_step(seed: int, steps: int, image_weight: float, video_weight: float) -> None:
    data = DataConfig(resolution_mix=(("64px", 1.0), ("256px", 1.0)), image_weight=image_weight, video_weight=video_weight)
    samples = planned([clip(row, frames=1 if row % 3 else 33, height=300 - 20 * row, width=300) for row in range(13)], data)
    mix, tokens = mix_of(samples, data), [sample.tokens for sample in samples]
    state, straight = SamplerState(), []
    for _ in range(steps + 3):
        plan = next_step(tokens, state, seed=seed, global_tokens=max(tokens) * 2, mix=mix)
        straight.append(plan)
        state = plan.state_after
    epoch_order.cache_clear()
    resumed = SamplerState(epoch=straight[steps - 1].state_after.epoch, consumed=straight[steps - 1].state_after.consumed)
    assert next_step(tokens, resumed, seed=seed, global_tokens=max(tokens) * 2, mix=mix_of(samples, data)) == straight[steps]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 3), st.integers(60, 200), st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_no_pack_exceeds_its_limit_and_no_sample_is_lost(tokens: list[int], dp: int, micro: int, limit: int, multiple: int) -> None:
    micro *= multiple
    packs = assign_packs(
        tokens, data_parallel_size=dp, num_microbatches=micro, hidden_size=64, max_tokens=limit, microbatch_multiple=multiple
    )
    sizes = {len(replica) for replica in packs}
    assert len(packs) == dp and len(sizes) == 1 and min(sizes) >= micro and min(sizes) % multiple == 0
    assert sorted(place for replica in packs for pack in replica for place in pack) == list(range(len(tokens)))
    assert all(sum(tokens[place] for place in pack) <= limit for replica in packs for pack in replica)


def test_a_limit_costs_little_balance_where_it_binds() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.choice([300, 1_000, 4_000, 9_000], 400, p=[0.4, 0.3, 0.2, 0.1]).tolist()
    free = assign_packs(tokens, data_parallel_size=8, num_microbatches=4, hidden_size=3072)
    fullest = max(sum(tokens[place] for place in pack) for replica in free for pack in replica)
    limit = int(sum(tokens) / 32 * 1.05)
    assert fullest > limit
    packs = assign_packs(tokens, data_parallel_size=8, num_microbatches=4, hidden_size=3072, max_tokens=limit)
    loads = [sum(sample_cost(tokens[place], hidden_size=3072) for pack in replica for place in pack) for replica in packs]
    assert len(packs[0]) == 4 and max(loads) / np.mean(loads) < 1.05


def test_a_sample_larger_than_a_pack_is_refused_with_the_reason() -> None:
    data = DataConfig(max_pack_tokens=1000)
    samples, skipped = plan_clips([clip(0, frames=1, height=256, width=256), clip(1)], data=data, encoders=ENCODERS, model=MODEL)
    assert [sample.clip.row for sample in samples] == [0]
    assert "exceed data.max_pack_tokens 1000" in skipped[0].reason
    with pytest.raises(ValueError, match="does not fit a pack of 10"):
        assign_packs([11], data_parallel_size=1, num_microbatches=1, hidden_size=64, max_tokens=10)

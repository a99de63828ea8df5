"""The sampler and the packs: everything once, nothing depends on the layout."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megasora.data.buckets import choose_frames, choose_size, named_fps, stride_to, token_grid
from megasora.data.plan import SamplerState, assign_packs, next_step, sample_cost
from megasora.diffusion.captions import training_caption

TOKENS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(TOKENS, st.integers(50, 200), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_an_epoch_takes_every_sample_once(tokens: list[int], budget: int, seed: int) -> None:
    state, taken = SamplerState(), []
    while state.epoch == 0:
        plan = next_step(tokens, state, seed=seed, global_tokens=budget)
        assert plan.samples
        assert sum(tokens[sample] for sample in plan.samples) <= budget
        taken += plan.samples
        state = plan.state_after
    assert sorted(taken) == list(range(len(tokens)))


@given(TOKENS, st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_packs_hold_every_sample_once(tokens: list[int], dp: int, microbatches: int) -> None:
    packs = assign_packs(tokens, data_parallel_size=dp, num_microbatches=microbatches, hidden_size=64)
    assert len(packs) == dp
    assert all(len(replica) == microbatches for replica in packs)
    assert sorted(place for replica in packs for pack in replica for place in pack) == list(range(len(tokens)))


def test_packs_of_mixed_lengths_cost_the_same() -> None:
    tokens = [8960] * 16 + [768] * 200 + [3000] * 40
    packs = assign_packs(tokens, data_parallel_size=8, num_microbatches=1, hidden_size=3072)
    costs = [sum(sample_cost(tokens[p], hidden_size=3072) for p in pack) for replica in packs for pack in replica]
    assert max(costs) / (sum(costs) / len(costs)) < 1.02


def test_sizes_frames_and_strides() -> None:
    assert choose_size(1080, 1920, resolution="256px", multiple=16) == (192, 336)
    assert choose_size(1920, 1080, resolution="256px", multiple=16) == (336, 192)
    assert choose_size(130, 80, resolution="64px", multiple=16) == (80, 48)
    assert choose_size(100, 130, resolution="manifest", multiple=16) == (96, 128)
    assert choose_frames(100, frame_counts=(129, 97, 65, 33, 1)) == 97
    assert [stride_to(fps, target_fps=24.0) for fps in (24.0, 25.0, 30.0, 60.0)] == [1, 2, 2, 3]
    assert token_grid(129, 256, 256, temporal_compression=4, spatial_compression=8, patch_size=2) == (33, 16, 16)
    dc_ae = {"temporal_compression": 4, "spatial_compression": 32, "patch_size": 1, "causal": False}
    assert [token_grid(frames, 768, 768, **dc_ae)[0] for frames in (1, 4, 16, 128)] == [1, 1, 4, 32]  # type: ignore[arg-type]
    assert token_grid(128, 768, 768, **dc_ae) == (32, 24, 24)  # type: ignore[arg-type]


def test_captions_carry_what_is_known() -> None:
    assert training_caption("A cat", fps=12, motion_score=3.6) == "A cat 12 FPS, 4 motion score."
    assert training_caption("A cat", fps=16.0, motion_score=None) == "A cat 16.0 FPS."
    assert training_caption("A cat", fps=None, motion_score=None) == "A cat"


def test_a_caption_names_the_rate_as_the_published_one_does() -> None:
    """Below the cap the file's own number, else the strided rate rounded down (hpcaitech/Open-Sora opensora/datasets/utils.py)."""
    named = [
        (fps, named_fps(fps, stride_to(fps, target_fps=24.0), target_fps=24.0)) for fps in (16.0, 23.976, 24.0, 25.0, 29.97, 30.0, 60.0)
    ]
    assert named == [(16.0, 16.0), (23.976, 23.976), (24.0, 24), (25.0, 12), (29.97, 14), (30.0, 15), (60.0, 20)]
    suffixes = [training_caption("", fps=fps, motion_score=None) for _, fps in named]
    assert suffixes == [f" {text} FPS." for text in ("16.0", "23.976", "24", "12", "14", "15", "20")]
    assert named_fps(float("nan"), 1, target_fps=24.0) is None
    assert named_fps(30.0, 1, target_fps=1000.0) is None  # no cap, no suffix

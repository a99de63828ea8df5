"""Which frames each condition gives, by hand for the published lengths: 129 frames are 33 latent frames, 33 are 9, 65 are 17. Where the
autoencoder is not causal 128 are 32, 32 are 8, 64 are 16 (hpcaitech/Open-Sora opensora/utils/train.py)."""

from __future__ import annotations

import pytest
import torch

from megasora.diffusion.conditions import (
    condition_latent,
    draw_kind,
    given_frames,
    held,
    holding_frames,
    possible_kinds,
    without_holding,
)

KINDS = {
    "t2v": ([], []),
    "i2v_head": ([(0, 1)], [0]),
    "i2v_loop": ([(0, 1), (128, 1)], [0, 32]),
    "i2v_tail": ([(128, 1)], [32]),
    "v2v_head": ([(0, 33)], list(range(9))),
    "v2v_tail": ([(96, 33)], list(range(24, 33))),
    "v2v_head_easy": ([(0, 65)], list(range(17))),
    "v2v_tail_easy": ([(64, 65)], list(range(16, 33))),
}
"""Kind -> (first pixel frame, count) of its runs, and the latent frames they become, of a clip of 129 frames."""


UNCAUSAL = {
    "t2v": ([], []),
    "i2v_head": ([(0, 1)], [0]),
    "i2v_loop": ([(0, 1), (127, 1)], [0, 31]),
    "i2v_tail": ([(127, 1)], [31]),
    "v2v_head": ([(0, 32)], list(range(8))),
    "v2v_tail": ([(96, 32)], list(range(24, 32))),
    "v2v_head_easy": ([(0, 64)], list(range(16))),
    "v2v_tail_easy": ([(64, 64)], list(range(16, 32))),
}
"""The same of a clip of 128 frames and an autoencoder that is not causal."""


@pytest.mark.parametrize("kind", UNCAUSAL)
def test_without_causality_given_frames_are_multiples_of_four(kind: str) -> None:
    runs, places = UNCAUSAL[kind]
    given = given_frames(kind, num_frames=128, causal=False)
    assert [(run.start, run.count) for run in given] == runs
    covered = [run.latent_start + frame for run in given for frame in range(run.latent_count)]
    assert covered == places


@pytest.mark.parametrize(("num_frames", "fitting"), [(1, 0), (4, 3), (32, 3), (36, 5), (64, 5), (68, 7)])
def test_without_causality_a_condition_leaves_a_latent_frame_to_make(num_frames: int, fitting: int) -> None:
    weights = {kind: 1.0 for kind in UNCAUSAL if kind != "t2v"}
    assert len(possible_kinds(weights, num_frames=num_frames, causal=False)) == max(1, fitting)
    drawn = draw_kind({"v2v_head": 1.0}, num_frames=num_frames, uniform=0.5, causal=False)
    assert drawn == ("v2v_head" if num_frames > 32 else "t2v")


@pytest.mark.parametrize("kind", KINDS)
def test_mask_and_latents_stand_on_exactly_the_given_latent_frames(kind: str) -> None:
    runs, places = KINDS[kind]
    given = given_frames(kind, num_frames=129)
    assert [(run.start, run.count) for run in given] == runs
    condition = condition_latent((2, 33, 1, 3), [(run, torch.full((2, run.latent_count, 1, 3), 5.0)) for run in given])
    mask = torch.tensor([float(frame in places) for frame in range(33)])[:, None, None].expand(33, 1, 3)
    assert torch.equal(condition[0], mask)
    assert torch.equal(condition[1:], torch.stack([5 * mask, 5 * mask]))


def test_a_latent_stands_where_its_own_frame_is() -> None:
    head, tail = given_frames("i2v_loop", num_frames=9)
    condition = condition_latent((1, 3, 1, 1), [(head, torch.full((1, 1, 1, 1), 3.0)), (tail, torch.full((1, 1, 1, 1), 4.0))])
    assert condition[:, :, 0, 0].tolist() == [[1, 0, 1], [3, 0, 4]]


@pytest.mark.parametrize(("num_frames", "fitting"), [(1, 0), (2, 3), (33, 3), (34, 5), (65, 5), (66, 7)])
def test_a_condition_leaves_at_least_one_frame_to_make(num_frames: int, fitting: int) -> None:
    weights = {kind: 1.0 for kind in KINDS if kind != "t2v"}
    kinds = possible_kinds(weights, num_frames=num_frames)
    assert len(kinds) == max(1, fitting)
    for kind in kinds:
        assert all(run.start + run.count <= num_frames and run.count < num_frames for run in given_frames(kind, num_frames=num_frames))


@pytest.mark.parametrize(
    ("uniform", "kind"), [(0.01, "t2v"), (0.24, "t2v"), (0.26, "i2v_head"), (0.74, "i2v_head"), (0.76, "i2v_tail"), (0.99, "i2v_tail")]
)
def test_kinds_are_drawn_by_their_weights(uniform: float, kind: str) -> None:
    assert draw_kind({"t2v": 1.0, "i2v_head": 2.0, "v2v_head": 9.0, "i2v_tail": 1.0}, num_frames=17, uniform=uniform) == kind


@pytest.mark.parametrize(
    ("kind", "frames", "shown"),
    [
        ("i2v_head", [0, 0, 0, *range(13)], [0, *range(1, 13)]),
        ("i2v_tail", [*range(3, 16), 15, 15, 15], list(range(3, 16))),
        ("i2v_loop", [0, 0, 0, *range(10), 9, 9, 9], list(range(10))),
        ("v2v_head", list(range(16)), list(range(16))),
        ("t2v", list(range(16)), list(range(16))),
    ],
)
def test_without_causality_a_given_picture_is_held_for_a_latent_frame(kind: str, frames: list[int], shown: list[int]) -> None:
    """prepare_visual_condition_uncausal with pad, and what api_fn removes after decoding."""
    video = torch.arange(16.0).view(1, 16, 1, 1).expand(3, -1, 2, 2)
    holding = holding_frames(kind, temporal_compression=4, causal=False)
    made = held(video, holding)
    assert made[0, :, 0, 0].tolist() == frames
    assert without_holding(made, holding)[0, :, 0, 0].tolist() == shown
    assert holding_frames(kind, temporal_compression=4, causal=True) == (0, 0)

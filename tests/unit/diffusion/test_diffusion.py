"""Flow matching against hand-computed numbers, and randomness that any slice can draw."""

from __future__ import annotations

import math

import pytest
import torch

from megasora.diffusion.conditions import condition_latent, draw_kind, given_frames, possible_kinds
from megasora.diffusion.flow import interpolate, sampling_times, shift_of, shift_time, training_time, velocity_target
from megasora.diffusion.guidance import Guidance, GuidedVelocity, denoise
from megasora.diffusion.patchify import patchify, unpatchify
from megasora.diffusion.philox import _CHUNK, Stream, key_of, normal_at, philox4x32, uniform_at

POINTS = ((256.0, 1.0), (4096.0, 3.0))


@pytest.mark.parametrize(
    ("word", "key", "expected"),
    [(0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"), (0xFFFFFFFF, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd")],
)
def test_philox_gives_the_published_vectors(word: int, key: int, expected: str) -> None:
    counter = torch.tensor([word])
    assert " ".join(f"{int(x):08x}" for x in philox4x32((counter,) * 4, key=key)) == expected


def test_two_normals_of_a_block_are_box_mullers() -> None:
    # the published block of counter 0 and key 0: two 53-bit uniforms, u = (bits + 1/2) / 2^53
    a, b, c, d = 0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8
    u, v = (((high << 21 | low >> 11) + 0.5) / 2**53 for high, low in ((a, b), (c, d)))
    radius, angle = math.sqrt(-2 * math.log(u)), 2 * math.pi * v
    found = normal_at(torch.arange(2), key=0, dtype=torch.float64).tolist()
    assert found == pytest.approx([radius * math.cos(angle), radius * math.sin(angle)], rel=1e-12)
    assert uniform_at(torch.tensor([0]), key=0).item() == u


def test_any_slice_of_noise_is_the_same_noise() -> None:
    key = key_of(seed=1, stream=Stream.NOISE, epoch=2, sample=3, step=4)
    whole = normal_at(torch.arange(10_000), key=key)
    chosen = torch.randperm(10_000)[:999]
    assert torch.equal(whole[chosen], normal_at(chosen, key=key))
    assert abs(float(whole.mean())) < 0.05
    assert abs(float(whole.std()) - 1) < 0.05


def test_a_long_draw_is_its_parts() -> None:
    """Draws are made chunk by chunk to bound their memory; element numbers count on through the chunks."""
    across = torch.arange(_CHUNK - 2, _CHUNK + 2)
    whole = normal_at(torch.arange(_CHUNK + 2), key=5)
    assert torch.equal(whole[-4:], normal_at(across, key=5))
    assert not torch.equal(whole[_CHUNK:], whole[:2])


def test_every_field_of_a_key_matters() -> None:
    keys = {
        key_of(seed=s, stream=stream, epoch=e, sample=n, step=k)
        for s in range(4)
        for stream in Stream
        for e in range(4)
        for n in range(16)
        for k in range(16)
    }
    assert len(keys) == 4 * len(Stream) * 4 * 16 * 16


def test_uniforms_lie_inside_the_open_interval() -> None:
    values = uniform_at(torch.arange(100_000), key=9)
    assert 0 < float(values.min()) < float(values.max()) < 1


def test_the_path_ends_at_noise_and_its_velocity_is_the_derivative() -> None:
    x_0, x_1 = torch.tensor([2.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    assert interpolate(x_0, x_1, 1.0, sigma_min=1e-5).item() == -1.0
    assert interpolate(x_0, x_1, 0.0, sigma_min=1e-5).item() == pytest.approx(2.0 - 1e-5)
    slope = (interpolate(x_0, x_1, 0.6, sigma_min=1e-5) - interpolate(x_0, x_1, 0.4, sigma_min=1e-5)) / 0.2
    assert slope.item() == pytest.approx(velocity_target(x_0, x_1, sigma_min=1e-5).item())


@pytest.mark.parametrize(("latent", "expected"), [((33, 32, 32), 5.745), ((33, 96, 96), 11.87), ((1, 32, 32), 1.0)])
def test_shift_has_the_published_values(latent: tuple[int, int, int], expected: float) -> None:
    assert shift_of(latent, points=POINTS, temporal=True) == pytest.approx(expected, rel=1e-3)


def test_times_are_shifted_toward_noise() -> None:
    assert shift_time(0.5, shift=3.0) == 0.75
    assert training_time(0.0, shift=1.0) == 0.5
    # sigmoid(log 3) = 3/4, and 3 x 3/4 / (1 + 2 x 3/4) = 9/10
    assert training_time(math.log(3), shift=1.0) == pytest.approx(0.75)
    assert training_time(math.log(3), shift=3.0) == pytest.approx(0.9)
    assert sampling_times(2, shift=3.0) == [1.0, 0.75, 0.0]


def test_patchify_orders_channels_then_rows_then_columns() -> None:
    latent = torch.arange(2 * 1 * 2 * 4.0).view(2, 1, 2, 4)
    tokens = patchify(latent, patch=2)
    assert tokens[0].tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
    assert torch.equal(unpatchify(tokens, grid=(1, 1, 2), patch=2), latent)


def test_conditions_give_the_frames_they_name() -> None:
    assert given_frames("t2v", num_frames=17) == ()
    head, tail = given_frames("i2v_loop", num_frames=17)
    assert (head.start, head.latent_start, tail.start, tail.latent_start) == (0, 0, 16, 4)
    (run,) = given_frames("v2v_tail", num_frames=129)
    assert (run.start, run.count, run.latent_start, run.latent_count) == (96, 33, 24, 9)
    with pytest.raises(ValueError, match="does not fit"):
        given_frames("v2v_head", num_frames=33)


def test_images_are_always_text_only() -> None:
    weights = {"t2v": 0.0, "i2v_head": 5.0, "v2v_head_easy": 1.0}
    assert possible_kinds(weights, num_frames=1) == {"t2v": 1.0}
    assert draw_kind(weights, num_frames=17, uniform=0.999) == "i2v_head"
    assert draw_kind({"t2v": 1.0, "i2v_head": 3.0}, num_frames=17, uniform=0.2) == "t2v"


def test_condition_marks_given_frames_only() -> None:
    (run,) = given_frames("i2v_tail", num_frames=9)
    condition = condition_latent((2, 3, 1, 1), [(run, torch.full((2, 1, 1, 1), 7.0))])
    assert condition[:, :, 0, 0].tolist() == [[0, 0, 1], [0, 0, 7], [0, 0, 7]]


def test_euler_is_exact_on_a_straight_path() -> None:
    x_0, x_1 = torch.tensor([[3.0]]), torch.tensor([[-1.0]])
    guidance = Guidance(text=7.5, given=3.0, text_oscillation=True, given_oscillation=True, ramp=True)
    straight = GuidedVelocity(
        velocity=lambda x, t, branches: [x_1 - x_0] * len(branches),
        guidance=guidance,
        with_given=False,
        latent_frame=torch.zeros(1, dtype=torch.int64),
        latent_frames=1,
    )
    result = denoise(straight, x_1, times=sampling_times(7, shift=5.0))
    assert result.item() == pytest.approx(3.0, abs=1e-5)
    assert not math.isnan(result.item())

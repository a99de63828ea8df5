"""What is measured of one clip, against closed forms and other libraries."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from megasora.evaluation.autoencoders.measure import ClipMeasures, NotFiniteError, measure_clip
from megasora.evaluation.autoencoders.pictures import AMPLIFIED, difference, shown_frames
from megasora.models.autoencoders.autoencoder import Autoencoder
from tests.unit.evaluation.autoencoders.known import Shifting, clip_of, no_weights, shifting
from tests.unit.evaluation.clips import noise


def measured(autoencoder: Autoencoder, levels: Tensor) -> ClipMeasures:
    with ThreadPoolExecutor() as pool:
        return measure_clip(autoencoder, levels, tools=no_weights(pool), warm=True).measures


def test_an_autoencoder_that_changes_nothing_is_equal() -> None:
    found = measured(shifting(), clip_of(noise(3, 16, 24)))
    assert (found.psnr, found.psnr_frames, found.equal_frames) == (math.inf, (None, None, None), 3)
    assert found.ssim == pytest.approx(1.0, abs=1e-12)
    assert found.encode_bytes is None  # a CPU's allocator keeps no record


@pytest.mark.parametrize("offset", [1, 5, 20])
def test_psnr_of_a_constant_offset(offset: int) -> None:
    # every level is off by d, on [0, 1] by d / 255: PSNR is 20 log10(1 / (d / 255))
    found = measured(shifting(levels=offset), clip_of(noise(2, 16, 16)))
    assert found.psnr_frames == pytest.approx([20 * math.log10(1 / (offset / 255))] * 2, abs=1e-9)


def test_psnr_is_of_each_frame_and_then_the_mean() -> None:
    # levels are cut off at 255: a frame at 253 is off by 2 of 4, one at 100 by 4, one at 255 by none, which leaves the mean
    frames = torch.stack([torch.full((16, 16, 3), level) for level in (253, 100, 255)])
    found = measured(shifting(levels=4), clip_of(frames))
    by_hand = [20 * math.log10(255 / 2), 20 * math.log10(255 / 4)]
    assert found.psnr_frames[:2] == pytest.approx(by_hand)
    assert found.psnr_frames[2] is None
    assert found.psnr == pytest.approx(sum(by_hand) / 2)
    assert found.equal_frames == 1


def test_ssim_is_skimages_of_each_frame() -> None:
    levels = clip_of(noise(2, 20, 28, low=0, high=256))
    found = measured(shifting(levels=30), levels)
    made = (levels.int() + 30).clamp(max=255)
    expected = [
        structural_similarity(
            levels[:, frame].numpy().astype(np.float64), made[:, frame].numpy().astype(np.float64), channel_axis=0, data_range=255,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False, win_size=11,
        )
        for frame in range(2)
    ]  # fmt: skip
    assert found.ssim == pytest.approx(np.mean(expected), abs=1e-12)
    assert found.ssim < 0.999


def test_latents_are_not_scaled_and_have_the_posteriors_spread() -> None:
    levels = clip_of(noise(2, 12, 12, low=0, high=256))
    with ThreadPoolExecutor() as pool:
        moments = measure_clip(shifting(spread=0.5), levels, tools=no_weights(pool), warm=False).moments
    pixels = levels.double().numpy().reshape(3, -1) / 127.5 - 1
    np.testing.assert_allclose(moments.mean, pixels.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(moments.std, np.sqrt(pixels.var(axis=1) + 0.25), rtol=1e-6)


def test_what_is_not_finite_is_no_picture() -> None:
    class Broken(Shifting):
        def pixels(self, z: Tensor) -> Tensor:
            return z / 0

    with pytest.raises(NotFiniteError, match="not finite; try --dtype fp32"):
        measured(Autoencoder(Broken(), tiling=None), clip_of(noise(1, 16, 16)))


def test_differences_are_amplified_and_frames_are_first_middle_last() -> None:
    a, b = torch.tensor([10, 0, 200], dtype=torch.uint8), torch.tensor([12, 0, 0], dtype=torch.uint8)
    assert difference(a, b).tolist() == [2 * AMPLIFIED, 0, 255]
    assert [shown_frames(count) for count in (1, 2, 32)] == [(0,), (0, 1), (0, 16, 31)]

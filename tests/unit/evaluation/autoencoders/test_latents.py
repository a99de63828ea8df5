"""Moments of latents merged clip by clip are those of all latents together, whoever measured which clip."""

from __future__ import annotations

import re

import numpy as np
import torch

from megasora.evaluation.autoencoders.latents import EDGES, NUM_BINS, LatentMoments, merged, moments_of
from megasora.evaluation.autoencoders.plots import histograms
from megasora.models.autoencoders.posterior import Posterior


def clips(offset: float = 0.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 2, 2), (3, 4, 5), (2, 7, 1)]
    return [torch.randn(4, *size, generator=generator, dtype=torch.float64) * (1 + k) + offset + k for k, size in enumerate(sizes)]


def moments(latent: torch.Tensor) -> LatentMoments:
    return moments_of(Posterior(mean=latent, std=torch.zeros_like(latent)))


def test_merged_moments_are_numpys_of_everything() -> None:
    for offset in (0.0, 1e6):  # a naive sum of squares would lose every digit at 1e6
        found = merged(map(moments, clips(offset)))
        assert found is not None
        together = np.concatenate([clip.flatten(1).numpy() for clip in clips(offset)], axis=1)
        assert found.count == together.shape[1]
        np.testing.assert_allclose(found.mean, together.mean(axis=1), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found.std, together.std(axis=1), rtol=1e-9)
        mean, std = found.over_channels
        np.testing.assert_allclose((mean, std), (together.mean(), together.std()), rtol=1e-9, atol=1e-12)


def test_a_histogram_counts_every_value_once_as_numpys() -> None:
    latent = torch.tensor([[-1e9, -0.2, 0.0, 0.001, 3.0, 1e9]]).double().view(1, 1, 1, 6)
    found = moments(latent)
    assert found.histogram.shape == (1, NUM_BINS)
    assert found.histogram.sum() == 6
    assert found.histogram[0, 0] == found.histogram[0, -1] == 1  # what lies beyond
    inner, _ = np.histogram([-0.2, 0.0, 0.001, 3.0], bins=EDGES)
    assert found.histogram[0, 1:-1].tolist() == inner[1:-1].tolist()


def test_a_file_keeps_them() -> None:
    found = moments(clips()[1])
    again = LatentMoments.of_arrays(found.arrays())
    assert again.count == found.count
    for name in ("mean", "squares", "histogram"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    assert merged([]) is None


def test_a_histogram_is_drawn_as_a_density_whatever_the_width_of_its_bins() -> None:
    # uniform on [-1, 1]: flat, 2 / (8 / sqrt(12) * 2) = 43 % of the picture's width of eight deviations, in its middle
    (drawn,) = histograms(moments(torch.linspace(-1, 1, 100_001, dtype=torch.float64).view(1, 1, 1, -1)))
    points = [tuple(map(float, point.split())) for point in re.findall(r"L([\d.]+ [\d.]+)", drawn)]
    high = [x for x, y in points if y < 21]
    assert abs(min(high) - 28.35) < 3 and abs(max(high) - 71.65) < 3
    assert all(y < 4 for x, y in points if 33 < x < 67)

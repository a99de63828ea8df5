"""How like two runs of frames are: SSIM and PSNR, which need no weights."""

from __future__ import annotations

import math
from concurrent.futures import Executor

import numpy as np
from torch import Tensor

DATA_RANGE = 255.0
"""Levels are those of the file, 0 to 255."""
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
"""A Gaussian of sigma 1.5 in 11 pixels, covariances over n, k1 0.01, k2 0.03 (Wang et al. 2004, doi 10.1109/TIP.2003.819861)."""


def psnr_of(mean_squared_error: float) -> float:
    """20 log10(255) - 10 log10(mean squared error of levels) in dB; infinite for none."""
    return math.inf if mean_squared_error == 0 else 20 * math.log10(DATA_RANGE) - 10 * math.log10(mean_squared_error)


def ssim_of_frames(a: Tensor, b: Tensor, *, pool: Executor) -> float:
    """SSIM of frames [n, 3, height, width] of levels, mean over pixels and channels, summed over the frames.

    In fp64: variances are differences of squares near 255^2, and in fp32 their rounding moves flat pictures by 2e-4.
    """
    from skimage.metrics import structural_similarity

    def one(pictures: tuple[Tensor, Tensor]) -> float:
        levels = (picture.cpu().numpy().astype(np.float64) for picture in pictures)
        return float(
            structural_similarity(
                *levels, data_range=DATA_RANGE, channel_axis=0, gaussian_weights=True, sigma=SSIM_SIGMA, use_sample_covariance=False
            )
        )

    return sum(pool.map(one, zip(a, b, strict=True)))

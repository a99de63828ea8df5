"""Flow matching: the path between a clean latent and noise, its velocity, and how times are drawn.

One convention, stated once: x_0 is the clean latent, x_1 the noise, t = 1 is noise.
Sources: hpcaitech/Open-Sora scripts/diffusion/train.py:434-462, MovieGen (arXiv 2410.13720) eq. 1-3, FLUX util.sampling.
"""

from __future__ import annotations

import math

from torch import Tensor


def interpolate(x_0: Tensor, x_1: Tensor, t: float | Tensor, *, sigma_min: float) -> Tensor:
    """x_t = (1 - t) x_0 + (1 - (1 - sigma_min)(1 - t)) x_1."""
    return (1 - t) * x_0 + (1 - (1 - sigma_min) * (1 - t)) * x_1


def velocity_target(x_0: Tensor, x_1: Tensor, *, sigma_min: float) -> Tensor:
    """Velocity that carries clean latents toward noise, d x_t / d t = (1 - sigma_min) x_1 - x_0."""
    return (1 - sigma_min) * x_1 - x_0


def shift_of(
    latent_grid: tuple[int, int, int],
    *,
    points: tuple[tuple[float, float], tuple[float, float]],
    temporal: bool,
    pixels_per_token: int = 4,
) -> float:
    """How strongly times are shifted toward noise for a latent of (T, H, W) pixels.

    The line through `points` at (H W) // pixels_per_token (FLUX counts 2x2 patches), times sqrt(T) when `temporal`. 256px 129 frames gives
    5.745, 768px 129 frames 11.87. With the DC-AE, whose patches are 1x1, the published training still divides by 4
    (scripts/diffusion/train.py), the published sampling by patch^2 = 1 (utils/sampling.py).
    """
    frames, height, width = latent_grid
    (x_a, y_a), (x_b, y_b) = points
    slope = (y_b - y_a) / (x_b - x_a)
    spatial = y_a + slope * ((height * width) // pixels_per_token - x_a)
    return spatial * math.sqrt(frames) if temporal else spatial


def shift_time(t: float, *, shift: float) -> float:
    """t -> a t / (1 + (a - 1) t); keeps 0 and 1."""
    return shift * t / (1 + (shift - 1) * t)


def training_time(standard_normal: float, *, shift: float) -> float:
    """Logit-normal time, shifted: sigmoid(normal), then `shift_time`."""
    return shift_time(1 / (1 + math.exp(-standard_normal)), shift=shift)


def sampling_times(steps: int, *, shift: float) -> list[float]:
    """steps + 1 times from 1 to 0, evenly spaced and then shifted (FLUX get_schedule)."""
    return [shift_time(1 - i / steps, shift=shift) for i in range(steps + 1)]

"""Classifier-free guidance with a text and an image branch, and the Euler loop.

v = v(0, 0) + g_img (v(0, img) - v(0, 0)) + g_txt (v(txt, img) - v(0, img)). Source: hpcaitech/Open-Sora utils/sampling.py (I2VDenoiser).
Everything is elementwise on tokens, so each rank guides its own share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

VelocityFunction = Callable[[Tensor, float, bool, bool], Tensor]
"""(tokens [n, C], t, with text, with image condition) -> velocity [n, C]."""


def oscillating(scale: float, *, step: int, on: bool) -> float:
    """Keep the scale in steps < 10 and even ones, use 1 in the others, when `on`."""
    return scale if not on or step < 10 or step % 2 == 0 else 1.0


def image_scale(scale: float, *, step: int, steps: int, latent_frame: Tensor, latent_frames: int) -> Tensor:
    """g_img per token: falls over steps as linspace(g_img, 1), and rises over latent frames as linspace(1, that).

    Args:
        latent_frame: int64 [n], latent frame of each token.
    """
    now = scale + (1.0 - scale) * (step / max(1, steps - 1))
    return 1.0 + (now - 1.0) * latent_frame / max(1, latent_frames - 1)


def combine(nothing: Tensor, image: Tensor, both: Tensor, *, g_txt: float, g_img: Tensor | float) -> Tensor:
    """The three-branch velocity."""
    return nothing + g_img * (image - nothing) + g_txt * (both - image)


def denoise(
    velocity: VelocityFunction,
    x_1: Tensor,
    *,
    times: Sequence[float],
    g_txt: float,
    g_img: float,
    with_image: bool,
    oscillation: bool,
    latent_frame: Tensor,
    latent_frames: int,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Euler from noise (t = 1) to a latent (t = 0).

    Args:
        velocity: the model on this rank's tokens.
        x_1: [n, C] noise tokens.
        times: steps + 1 times, from 1 to 0.
        g_txt, g_img: guidance scales; without an image the image branches are left out (two evaluations a step).
        with_image: whether an image condition is given.
        oscillation: apply `oscillating` to g_txt.
        latent_frame, latent_frames: latent frame of each token, and how many there are.
        on_step: called after each step (progress bar).
    """
    x = x_1
    steps = len(times) - 1
    for step, (now, following) in enumerate(zip(times[:-1], times[1:], strict=True)):
        text_scale = oscillating(g_txt, step=step, on=oscillation)
        both = velocity(x, now, True, with_image)
        nothing = velocity(x, now, False, False)
        if with_image:
            scale = image_scale(
                oscillating(g_img, step=step, on=oscillation),
                step=step,
                steps=steps,
                latent_frame=latent_frame,
                latent_frames=latent_frames,
            )
            image = velocity(x, now, False, True)
            v = combine(nothing, image, both, g_txt=text_scale, g_img=scale[:, None].to(x.dtype))
        else:
            v = nothing + text_scale * (both - nothing)
        x = x + (following - now) * v
        if on_step is not None:
            on_step(step)
    return x


def latent_frame_of(tokens: Tensor, *, grid: tuple[int, int, int]) -> Tensor:
    """int64: latent frame of each token number."""
    return torch.div(tokens, grid[1] * grid[2], rounding_mode="floor")

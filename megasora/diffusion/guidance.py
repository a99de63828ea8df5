"""Guidance of text and of the given frames, and the Euler loop.

v = v(0, 0) + g_img (v(0, img) - v(0, 0)) + g_txt (v(txt, img) - v(0, img)). Source: hpcaitech/Open-Sora opensora/utils/sampling.py
(I2VDenoiser, get_oscillation_gs). Everything is elementwise on tokens, so each rank guides its own share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FULL_STEPS = 10
"""An oscillating scale rests in odd steps from this one on (get_oscillation_gs: force_num)."""


class Branch(NamedTuple):
    """What the model is told in one evaluation."""

    text: bool
    """The prompt, or the negative one."""
    given: bool
    """The given frames, or none."""


VelocityFunction = Callable[[Tensor, float, Sequence[Branch]], list[Tensor]]
"""(tokens [n, C], t, branches) -> a velocity [n, C] for each branch."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly a clip follows its text and its given frames."""

    text: float
    """g_txt."""
    given: float
    """g_img: guidance of the given frames; without effect where none are given."""
    text_oscillation: bool
    """Rest g_txt at 1 in odd steps from FULL_STEPS on."""
    given_oscillation: bool
    """The same for g_img."""
    ramp: bool
    """Let g_img fall over the steps and rise over the latent frames; the published code does so for i2v only, not for v2v."""

    def text_scale(self, step: int) -> float:
        """g_txt of a step."""
        return _oscillating(self.text, step=step, on=self.text_oscillation)

    def given_scale(self, step: int, *, steps: int, latent_frame: Tensor, latent_frames: int) -> Tensor:
        """g_img of each token.

        With the ramp it is linspace(1, s, T)[f] for latent frame f of T, where s = linspace(g_img, 1, N + 1)[i] in step i of N: the
        published schedule has N + 1 times, so in the last step s is not yet 1. A scale that rests at 1 (or is below) has no ramp.

        Args:
            step, steps: i and N.
            latent_frame: int64 [n], f of each token.
            latent_frames: T.

        Returns:
            fp64 [n].
        """
        scale = _oscillating(self.given, step=step, on=self.given_oscillation)
        if not self.ramp or scale <= 1.0:
            return torch.full(latent_frame.shape, scale, dtype=torch.float64, device=latent_frame.device)
        now = scale + (1.0 - scale) * step / steps
        return 1.0 + (now - 1.0) * latent_frame.double() / max(1, latent_frames - 1)


def _oscillating(scale: float, *, step: int, on: bool) -> float:
    return scale if not on or step < FULL_STEPS or step % 2 == 0 else 1.0


def combine(nothing: Tensor, given: Tensor, both: Tensor, *, g_txt: float, g_img: Tensor | float) -> Tensor:
    """The three-branch velocity."""
    return nothing + g_img * (given - nothing) + g_txt * (both - given)


@dataclass(frozen=True, kw_only=True)
class GuidedVelocity:
    """The guided velocity of a clip's tokens at each step.

    Args:
        velocity: the model on this rank's tokens.
        guidance: scales; None for a model that was distilled to follow its embedded guidance: one branch, nothing to combine.
        with_given: whether frames are given; without any the branch that has them alone is left out.
        latent_frame: int64 [n], latent frame of each token.
        latent_frames: how many there are.
    """

    velocity: VelocityFunction
    guidance: Guidance | None
    with_given: bool
    latent_frame: Tensor
    latent_frames: int

    def __call__(self, x: Tensor, t: float, *, step: int, steps: int) -> Tensor:
        """[n, C] at tokens x [n, C] and time t, in step `step` of `steps`."""
        both = Branch(text=True, given=self.with_given)
        if self.guidance is None:
            return self.velocity(x, t, [both])[0]
        nothing, text_scale = Branch(text=False, given=False), self.guidance.text_scale(step)
        if not self.with_given:
            v_both, v_nothing = self.velocity(x, t, [both, nothing])
            return v_nothing + text_scale * (v_both - v_nothing)
        v_both, v_given, v_nothing = self.velocity(x, t, [both, Branch(text=False, given=True), nothing])
        scale = self.guidance.given_scale(step, steps=steps, latent_frame=self.latent_frame, latent_frames=self.latent_frames)
        return combine(v_nothing, v_given, v_both, g_txt=text_scale, g_img=scale[:, None].to(x.dtype))


def denoise(velocity: GuidedVelocity, x_1: Tensor, *, times: Sequence[float], on_step: Callable[[int], None] | None = None) -> Tensor:
    """Euler from noise (t = 1) to a latent (t = 0).

    Args:
        velocity: guided.
        x_1: [n, C] noise tokens.
        times: steps + 1 times, from 1 to 0.
        on_step: called after each step (progress bar).
    """
    x = x_1
    steps = len(times) - 1
    for step, (now, following) in enumerate(zip(times[:-1], times[1:], strict=True)):
        x = x + (following - now) * velocity(x, now, step=step, steps=steps)
        if on_step is not None:
            on_step(step)
    return x


def latent_frame_of(tokens: Tensor, *, grid: tuple[int, int, int]) -> Tensor:
    """int64: latent frame of each token number."""
    return torch.div(tokens, grid[1] * grid[2], rounding_mode="floor")

"""The branches of guidance, with a model whose answer says which branch was asked: 1 nothing, 2 image, 4 both, 8 text alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megasora.diffusion.guidance import denoise

ANSWERS = {(False, False): 1.0, (False, True): 2.0, (True, True): 4.0, (True, False): 8.0}


def branches(x: Tensor, t: float, text: bool, image: bool) -> Tensor:
    return torch.full_like(x, ANSWERS[text, image])


def from_zero(times: Sequence[float], *, with_image: bool, oscillation: bool = False) -> list[float]:
    """Where Euler goes from 0, for a token of the first and one of the last of 5 latent frames; g_txt 7.5, g_img 3."""
    end = denoise(
        branches,
        torch.zeros(2, 1),
        times=times,
        g_txt=7.5,
        g_img=3.0,
        with_image=with_image,
        oscillation=oscillation,
        latent_frame=torch.tensor([0, 4]),
        latent_frames=5,
    )
    return end[:, 0].tolist()


def test_three_branches_with_an_image() -> None:
    # 1 + g_img (2 - 1) + 7.5 (4 - 2) with g_img 1 on the first latent frame and 3 on the last
    assert from_zero([1.0, 0.0], with_image=True) == [-17.0, -19.0]


def test_two_branches_without_an_image() -> None:
    assert from_zero([1.0, 0.0], with_image=False) == [-(1 + 7.5 * (8 - 1))] * 2


def test_every_interval_is_walked_once() -> None:
    assert from_zero([1.0, 0.75, 0.0], with_image=False) == pytest.approx(from_zero([1.0, 0.0], with_image=False))


def test_both_scales_rest_in_odd_steps_after_the_tenth() -> None:
    # only step 11 of 23 moves; there g_img would be 3 - 2 x 11/22 = 2 on the last latent frame
    times = [1.0] * 12 + [0.0] * 12
    assert from_zero(times, with_image=True, oscillation=True) == [-4.0, -4.0]
    assert from_zero(times, with_image=True, oscillation=False) == [-17.0, -18.0]

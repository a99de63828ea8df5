"""Image and video conditions: which frames are given, and the [mask; masked latent] the model sees.

Given frames are encoded on their own, so nothing leaks from the frames after them. Source: hpcaitech/Open-Sora utils/inference.py
(prepare_inference_condition) and scripts/diffusion/train.py; "33 frames" are 9 latent frames at 4x temporal compression, 65 are 17.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

V2V_FRAMES = 33
V2V_EASY_FRAMES = 65
"""Conditioned pixel frames of v2v and of its easy variant (Open-Sora utils/inference.py)."""


@dataclass(frozen=True, kw_only=True)
class GivenFrames:
    """A run of pixel frames that is encoded on its own and where its latent frames stand."""

    start: int
    count: int
    latent_start: int
    latent_count: int


def given_frames(kind: str, *, num_frames: int, temporal_compression: int = 4) -> tuple[GivenFrames, ...]:
    """Runs of frames a condition gives, for a clip of 4k + 1 frames; empty for t2v.

    Raises:
        ValueError: unknown kind, or the clip is too short for it.
    """
    latent_frames = (num_frames - 1) // temporal_compression + 1
    head = GivenFrames(start=0, count=1, latent_start=0, latent_count=1)
    tail = GivenFrames(start=num_frames - 1, count=1, latent_start=latent_frames - 1, latent_count=1)
    if kind == "t2v":
        return ()
    if kind.startswith("i2v") and num_frames > 1:
        return {"i2v_head": (head,), "i2v_loop": (head, tail), "i2v_tail": (tail,)}[kind]
    if kind.startswith("v2v"):
        count = V2V_EASY_FRAMES if kind.endswith("easy") else V2V_FRAMES
        latent_count = (count - 1) // temporal_compression + 1
        if num_frames > count:
            if "head" in kind:
                return (GivenFrames(start=0, count=count, latent_start=0, latent_count=latent_count),)
            start, latent_start = num_frames - count, latent_frames - latent_count
            return (GivenFrames(start=start, count=count, latent_start=latent_start, latent_count=latent_count),)
    raise ValueError(f"condition {kind} does not fit a clip of {num_frames} frames; use t2v or a longer clip")


def possible_kinds(weights: Mapping[str, float], *, num_frames: int) -> dict[str, float]:
    """The kinds with a positive weight that fit a clip of this length; t2v when none does."""
    needs = {"t2v": 1, "i2v": 2, "v2v": V2V_FRAMES + 1}
    fits = {
        kind: weight
        for kind, weight in weights.items()
        if weight > 0 and num_frames >= (V2V_EASY_FRAMES + 1 if kind.endswith("easy") else needs[kind[:3]])
    }
    return fits or {"t2v": 1.0}


def draw_kind(weights: Mapping[str, float], *, num_frames: int, uniform: float) -> str:
    """A kind drawn by weight among those that fit, from one uniform in (0, 1)."""
    kinds = possible_kinds(weights, num_frames=num_frames)
    threshold = uniform * sum(kinds.values())
    for kind, weight in kinds.items():
        threshold -= weight
        if threshold <= 0:
            return kind
    return next(reversed(kinds))


def condition_latent(shape: tuple[int, int, int, int], given: list[tuple[GivenFrames, Tensor]]) -> Tensor:
    """[1 + C, T, H, W]: a mask that is 1 on given latent frames, then the given latents (0 elsewhere).

    Args:
        shape: (C, T, H, W) of the clip's latent.
        given: runs and their own latents [C, latent_count, H, W].
    """
    channels, frames, height, width = shape
    dtype, device = (given[0][1].dtype, given[0][1].device) if given else (torch.float32, torch.device("cpu"))
    condition = torch.zeros(1 + channels, frames, height, width, dtype=dtype, device=device)
    for run, latent in given:
        place = slice(run.latent_start, run.latent_start + run.latent_count)
        condition[0, place] = 1
        condition[1:, place] = latent
    return condition

"""Image and video conditions: which frames are given, and the [mask; masked latent] the model sees.

Given frames are encoded on their own, so nothing leaks from the frames after them. Source: hpcaitech/Open-Sora utils/inference.py
(prepare_inference_condition) and utils/train.py (prepare_visual_condition_causal, prepare_visual_condition_uncausal); "33 frames" are 9
latent frames at 4x temporal compression, 65 are 17. A non-causal autoencoder has 32 frames in 8 latent frames and 64 in 16; there the
latent frame of one given picture stands where four frames do, and the clip itself is not padded, as in training there (pad=False).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.config.latent_frames import latent_frames

V2V_FRAMES = 33
V2V_EASY_FRAMES = 65
"""Conditioned pixel frames of v2v and of its easy variant, one fewer where the autoencoder is not causal (Open-Sora utils/train.py)."""


@dataclass(frozen=True, kw_only=True)
class GivenFrames:
    """A run of pixel frames that is encoded on its own and where its latent frames stand."""

    start: int
    count: int
    latent_start: int
    latent_count: int


def given_frames(kind: str, *, num_frames: int, temporal_compression: int = 4, causal: bool = True) -> tuple[GivenFrames, ...]:
    """Runs of frames a condition gives, for a clip of 4k + 1 frames (4k where the autoencoder is not causal); empty for t2v.

    Raises:
        ValueError: unknown kind, or the clip is too short for it.
    """
    total = latent_frames(num_frames, compression=temporal_compression, causal=causal)
    head = GivenFrames(start=0, count=1, latent_start=0, latent_count=1)
    tail = GivenFrames(start=num_frames - 1, count=1, latent_start=total - 1, latent_count=1)
    if kind == "t2v":
        return ()
    if kind.startswith("i2v") and num_frames > 1:
        return {"i2v_head": (head,), "i2v_loop": (head, tail), "i2v_tail": (tail,)}[kind]
    if kind.startswith("v2v"):
        count = _v2v_frames(kind, causal=causal)
        latent_count = latent_frames(count, compression=temporal_compression, causal=causal)
        if num_frames > count:
            if "head" in kind:
                return (GivenFrames(start=0, count=count, latent_start=0, latent_count=latent_count),)
            start, latent_start = num_frames - count, total - latent_count
            return (GivenFrames(start=start, count=count, latent_start=latent_start, latent_count=latent_count),)
    raise ValueError(f"condition {kind} does not fit a clip of {num_frames} frames; use t2v or a longer clip")


def _v2v_frames(kind: str, *, causal: bool) -> int:
    """Pixel frames that a v2v kind gives."""
    return (V2V_EASY_FRAMES if kind.endswith("easy") else V2V_FRAMES) - (not causal)


def possible_kinds(weights: Mapping[str, float], *, num_frames: int, causal: bool = True) -> dict[str, float]:
    """The kinds with a positive weight that fit a clip of this length; t2v when none does."""

    def fits(kind: str) -> bool:
        return num_frames > (_v2v_frames(kind, causal=causal) if kind.startswith("v2v") else 1 if kind.startswith("i2v") else 0)

    return {kind: weight for kind, weight in weights.items() if weight > 0 and fits(kind)} or {"t2v": 1.0}


def draw_kind(weights: Mapping[str, float], *, num_frames: int, uniform: float, causal: bool = True) -> str:
    """A kind drawn by weight among those that fit, from one uniform in (0, 1)."""
    kinds = possible_kinds(weights, num_frames=num_frames, causal=causal)
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

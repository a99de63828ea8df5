"""Image and video conditions: which frames are given, and the [mask; masked latent] the model sees.

Given frames are encoded on their own, so nothing leaks from the frames after them. Source: hpcaitech/Open-Sora utils/inference.py
(prepare_inference_condition) and utils/train.py (prepare_visual_condition_causal, prepare_visual_condition_uncausal); "33 frames" are 9
latent frames at 4x temporal compression, 65 are 17. A non-causal autoencoder has 32 frames in 8 latent frames and 64 in 16; there the
latent frame of one given picture stands where four frames do: the picture is held. Decoded clips lose the frames that only hold one
(utils/sampling.py, api_fn); whether pictures are held as well when training encodes clips is a choice there (pad, off) and here.
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


def holding_frames(kind: str, *, temporal_compression: int, causal: bool) -> tuple[int, int]:
    """Frames at a clip's head and tail that only hold a given picture, where its latent frame stands for several."""
    held = 0 if causal or not kind.startswith("i2v") else temporal_compression - 1
    return (held if kind in ("i2v_head", "i2v_loop") else 0), (held if kind in ("i2v_tail", "i2v_loop") else 0)


def held(video: Tensor, holding: tuple[int, int]) -> Tensor:
    """A clip [3, T, H, W] whose first and last picture are held for as many frames more, cut to its length.

    The first frame stays the first; where only the last is held the first frames are cut, else the last ones
    (Open-Sora utils/train.py, prepare_visual_condition_uncausal with pad; its i2v_tail gives another frame than the clip's last, taken
    here to be a slip).
    """
    head, tail = holding
    if not head and not tail:
        return video
    frames = video.shape[1]
    kept = video[:, : frames - head - tail] if head else video[:, tail:]
    return torch.cat([kept[:, :1].expand(-1, head, -1, -1), kept, kept[:, -1:].expand(-1, tail, -1, -1)], dim=1)


def without_holding(video: Tensor, holding: tuple[int, int]) -> Tensor:
    """A decoded clip [3, T, H, W] without the frames that only hold a picture."""
    head, tail = holding
    return video[:, head : video.shape[1] - tail]


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

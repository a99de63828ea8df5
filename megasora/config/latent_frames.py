"""Latent frames of a clip: causal autoencoders keep frame 0 by itself, the others compress every frame.

HunyuanVideo's is causal: 4k + 1 frames give k + 1. The video DC-AE is not: 4k frames give k, and an image gives one
(hpcaitech/Open-Sora opensora/utils/train.py, prepare_visual_condition_uncausal; opensora/models/dc_ae/models/dc_ae.py, get_latent_size).
4 frames are no clip of it: their one latent frame is decoded to one frame, as a picture's is.
"""

from __future__ import annotations


def latent_frames(num_frames: int, *, compression: int, causal: bool) -> int:
    """Latent frames of a clip of `num_frames`, a count that `is_frame_count` allows."""
    if causal:
        return (num_frames - 1) // compression + 1
    return 1 if num_frames == 1 else num_frames // compression


def is_frame_count(num_frames: int, *, compression: int, causal: bool) -> bool:
    """Whether the autoencoder takes clips of this many frames."""
    return num_frames == 1 or (num_frames > (0 if causal else compression) and (num_frames - causal) % compression == 0)


def nearest_frame_count(num_frames: int, *, compression: int, causal: bool) -> int:
    """An allowed count near a number of frames: the next below it, or 1; where the shortest clip is nearer, that."""
    if causal:
        return max(0, num_frames - 1) // compression * compression + 1
    return 1 if num_frames <= 1 else max(2, num_frames // compression) * compression


def frame_rule(*, compression: int, causal: bool) -> str:
    """The allowed counts in words: '1 or 4k+1', or '1 or 4k from 8 on'."""
    return f"1 or {compression}k{'+1' if causal else f' from {2 * compression} on'}"

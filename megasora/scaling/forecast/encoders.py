"""What the autoencoder and the text encoders cost a step, where clips are encoded beside training.

FLOPs of the HunyuanVideo VAE: 79.2 TFLOP to encode 129 frames of 256 x 256 whole (counted by torch's FlopCounterMode on the meta device,
megasora's AutoencoderKLHunyuanVideo); a larger picture is cut into tiles, whose pixels count. The DC-AE's: 26.25 TFLOP for 32 frames, its
tiles in time alike. T5-XXL: 2 x 4.76 B parameters a token (transformers T5EncoderModel of google/t5-v1_1-xxl); CLIP-L is a thousandth.
"""

from __future__ import annotations

from collections.abc import Sequence

from megasora.config.schema import EncodersConfig, RunConfig
from megasora.data.plan import PlannedClip
from megasora.perf.hardware import Hardware

VAE_FLOPS_PER_PIXEL = 79.2e12 / (129 * 256 * 256)
"""FLOPs to encode a pixel of a frame with the HunyuanVideo VAE."""
DC_AE_FLOPS_PER_PIXEL = 26.25e12 / (32 * 256 * 256)
"""The same with the video DC-AE (4x32x32)."""
DC_AE_TILE_FRAMES, DC_AE_OVERLAP = 32, 0.25
"""Frames of a DC-AE tile and the share it has in common with the next (hpcaitech/Open-Sora opensora/models/dc_ae)."""
T5_PARAMETERS = 4.76e9


def encode_flops(clip: PlannedClip, encoders: EncodersConfig) -> float:
    """FLOPs of a clip's latent and of its text."""
    pixels = tiled(clip.height, encoders) * tiled(clip.width, encoders)
    if encoders.causal:
        video = VAE_FLOPS_PER_PIXEL * clip.num_frames * pixels
    else:
        frames = _covered(clip.num_frames, DC_AE_TILE_FRAMES, DC_AE_OVERLAP)
        video = DC_AE_FLOPS_PER_PIXEL * frames * pixels
    return video + 2 * T5_PARAMETERS * clip.text_tokens


def tiled(side: int, encoders: EncodersConfig) -> int:
    """Pixels along a side that tiles of it cover together, overlaps counted as often as they are computed."""
    return _covered(side, encoders.tile_size, encoders.tile_overlap) if encoders.tile_size else side


def _covered(length: int, tile: int, overlap: float) -> int:
    if length <= tile:
        return length
    step = int(tile * (1 - overlap))
    return sum(min(tile, length - start) for start in range(0, length, step))


def encoding_s(config: RunConfig, clips: Sequence[PlannedClip], *, ranks: int, hardware: Hardware) -> float:
    """Seconds that the busiest of a replica's ranks encodes for a step: whole clips each, as `training.feed` shares them out.

    0 with a cache of latents, and where the hardware's profile does not know.
    """
    if config.data.cache is not None or not hardware.rates.encoder:
        return 0.0
    own = [sum(encode_flops(clip, config.encoders) for clip in clips[rank::ranks]) for rank in range(min(ranks, len(clips)))]
    return max(own, default=0.0) / hardware.rates.encoder

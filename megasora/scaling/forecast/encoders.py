"""What the autoencoder and the text encoders cost a step, where clips are encoded beside training.

The autoencoder's FLOPs are counted, tile by tile, on the meta device (`models.autoencoders.cost`). T5-XXL: 2 x 4.76 B parameters a token
(transformers T5EncoderModel of google/t5-v1_1-xxl); CLIP-L is a thousandth.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from megasora.config.schema import EncodersConfig, RunConfig
from megasora.data.plan import PlannedClip
from megasora.models.autoencoders.cost import AutoencoderCost
from megasora.models.encoders.bundle import counted_autoencoder
from megasora.perf.hardware import Hardware

T5_PARAMETERS = 4.76e9


def encode_flops(clip: PlannedClip, encoders: EncodersConfig) -> float:
    """FLOPs of a clip's latent and of its text; without a folder those of the published autoencoder of these compressions."""
    video = latent_flops(encoders, clip.num_frames, clip.height, clip.width)
    return video + 2 * T5_PARAMETERS * clip.text_tokens if video else 0.0


@lru_cache(maxsize=4096)
def latent_flops(encoders: EncodersConfig, num_frames: int, height: int, width: int) -> int:
    """FLOPs to encode a clip of this size in pixels; 0 where there is neither a folder nor a published size."""
    cost = _cost(encoders)
    return 0 if cost is None else cost.encode(num_frames=num_frames, height=height, width=width)


@lru_cache(maxsize=8)
def _cost(encoders: EncodersConfig) -> AutoencoderCost | None:
    autoencoder = counted_autoencoder(encoders)
    return None if autoencoder is None else AutoencoderCost(autoencoder)


def encoding_s(config: RunConfig, clips: Sequence[PlannedClip], *, ranks: int, hardware: Hardware) -> float:
    """Seconds that the busiest of a replica's ranks encodes for a step: whole clips each, as `training.feed` shares them out.

    0 with a cache of latents, and where the hardware's profile does not know.
    """
    if config.data.cache is not None or not hardware.rates.encoder:
        return 0.0
    own = [sum(encode_flops(clip, config.encoders) for clip in clips[rank::ranks]) for rank in range(min(ranks, len(clips)))]
    return max(own, default=0.0) / hardware.rates.encoder

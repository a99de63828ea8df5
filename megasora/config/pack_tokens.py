"""How many tokens a pack holds and a rank's share of it, from the settings alone: the largest a step can ask for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megasora.config.latent_frames import latent_frames
from megasora.config.schema import EncodersConfig, RunConfig

FP8_ROW_MULTIPLE = {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""Rows of an FP8 matrix product: 8 is the kernel's limit, 16 safe, 128 the block of `blockwise`, 32 that of `mxfp8`
(Transformer Engine 2.11, pytorch/utils.py and pytorch/quantization)."""


@dataclass(frozen=True, kw_only=True)
class PackTokens:
    """The fullest pack of a step."""

    text: int
    video: int
    samples: int
    """0 when the sizes of clips are not known (data.resolution manifest); text and video are then shares of the token budget."""
    num_microbatches: int
    """Of a replica and step, raised where max_pack_tokens asks for more."""

    def share(self, *, tp: int, cp: int, row_multiple: int) -> int:
        """Tokens of one rank of TP x CP, both streams padded as `parallel.pack.PackSplit` does."""
        unit = tp * cp * row_multiple
        return sum(-(-tokens // unit) * row_multiple for tokens in (self.text, self.video))


def largest_sample(config: RunConfig) -> int | None:
    """Video tokens of the largest clip; None when clips keep their own size."""
    found = largest_clip(config)
    return None if found is None else _video_tokens(config.encoders, config.model.patch_size, *found)


def largest_clip(config: RunConfig) -> tuple[int, float] | None:
    """(frames, side in pixels of a square) of the clip with most tokens: the longest of the largest resolution class, or the largest pair
    of data.bucket_mix; None when clips keep their own size."""
    data = config.data
    names = tuple(name for name, weight in data.resolution_mix if weight > 0) or (data.resolution,)
    pairs = tuple((name, max(data.frame_counts)) for name in names)
    if data.bucket_mix:
        pairs = tuple((name, frames) for name, frames, probability, _ in data.bucket_mix if probability > 0 and frames in data.frame_counts)
    return _largest(pairs, config.encoders, config.model.patch_size)


@lru_cache(maxsize=64)
def _largest(pairs: tuple[tuple[str, int], ...], encoders: EncodersConfig, patch_size: int) -> tuple[int, float] | None:
    """Of (class, frames) pairs; a planner asks thousands of times."""
    sides = {name: _side(name) for name, _ in pairs}
    if not all(sides.values()):
        return None
    return max(((frames, sides[name]) for name, frames in pairs), key=lambda clip: _video_tokens(encoders, patch_size, *clip))


def _video_tokens(encoders: EncodersConfig, patch_size: int, frames: int, side: float) -> int:
    unit = encoders.spatial_compression * patch_size
    return latent_frames(frames, compression=encoders.temporal_compression, causal=encoders.causal) * int(side / unit) ** 2


def _side(resolution: str) -> float:
    """Side in pixels of a square clip of a class ('256px', or '480p': 480 lines of 16:9); 0 when it is none."""
    side = resolution.removesuffix("px").removesuffix("p")
    if not side.isdecimal() or side == resolution:
        return 0.0
    return float(side) if resolution.endswith("px") else float(side) * 4 / 3


def fullest_pack(config: RunConfig, *, world_size: int) -> PackTokens:
    """The fullest pack of a step of nothing but largest clips (without them: of the token budget, evenly)."""
    data, parallel = config.data, config.parallel
    replicas = max(1, world_size // parallel.model_parallel_size)
    multiple, limit = parallel.microbatch_multiple, data.max_pack_tokens
    microbatches = -(-data.num_microbatches // multiple) * multiple
    video = largest_sample(config)
    if video is None:
        budget = -(-data.global_tokens // replicas)
        if limit is not None:
            microbatches = max(microbatches, -(-budget // limit // multiple) * multiple)
        tokens = -(-budget // microbatches)
        return PackTokens(text=0, video=tokens, samples=0, num_microbatches=microbatches)
    size = video + data.text_tokens
    of_replica = -(-max(1, data.global_tokens // size) // replicas)
    if limit is not None:
        fitting = max(1, limit // size)
        microbatches = max(microbatches, -(-of_replica // (fitting * multiple)) * multiple)
    samples = -(-of_replica // microbatches)
    return PackTokens(text=samples * data.text_tokens, video=samples * video, samples=samples, num_microbatches=microbatches)

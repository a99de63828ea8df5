"""What the cache stores of a planned clip: tensors, their shapes and the exact bytes, all known from the plan.

Latents are those of the clip and of every run of condition frames that a kind can give, each encoded on its own, without the autoencoder's
scaling factor. A run is named by its first frame and its length, so kinds that give the same frames share it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from megasora.config.latent_frames import latent_frames
from megasora.config.schema import ModelConfig
from megasora.data.cache.shards import END_BYTES, MEMBERS, Layout, key_of_clip, safetensors_size, tar_bytes
from megasora.data.plan import PlannedClip
from megasora.diffusion.captions import training_caption
from megasora.diffusion.conditions import GivenFrames, given_frames, possible_kinds

Store = Literal["latents", "text", "both"]
Latents = Literal["mean_std", "sampled"]
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def latent_names(latents: Latents, run: tuple[int, int] | None) -> tuple[str, ...]:
    """Tensor names of the clip's latent, or of a run (first frame, length): mean and std, or the one sample."""
    stem = "" if run is None else f"given.{run[0]}.{run[1]}."
    return tuple(f"{stem}{part}" for part in (("mean", "std") if latents == "mean_std" else ("sample",)))


def stored_runs(kinds: Sequence[str], *, num_frames: int, temporal_compression: int, causal: bool = True) -> tuple[GivenFrames, ...]:
    """Runs of frames that some of the kinds give for a clip of this length, each once, in order."""
    fitting = possible_kinds(dict.fromkeys(kinds, 1.0), num_frames=num_frames, causal=causal)
    runs = {
        (run.start, run.count): run
        for kind in fitting
        for run in given_frames(kind, num_frames=num_frames, temporal_compression=temporal_compression, causal=causal)
    }
    return tuple(runs[place] for place in sorted(runs))


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """How samples are stored."""

    store: Store
    latents: Latents
    kinds: tuple[str, ...]
    """Conditions whose frames are stored; t2v needs none."""
    latent_channels: int
    temporal_compression: int
    causal: bool
    spatial_compression: int
    text_dim: int
    vec_dim: int
    dtype: Literal["fp32", "bf16"]

    def latents_of(self, clip: PlannedClip) -> Layout:
        """Tensors of a clip's latents."""
        return self._latents(clip.num_frames, clip.height, clip.width)

    def text_of(self, clip: PlannedClip) -> Layout:
        """Tensors of a clip's text."""
        return text_layout(clip.text_tokens, text_dim=self.text_dim, vec_dim=self.vec_dim, dtype=TORCH_DTYPES[self.dtype])

    @lru_cache(maxsize=4096)  # noqa: B019 (one small object per run)
    def _latents(self, num_frames: int, height: int, width: int) -> Layout:
        dtype, unit = TORCH_DTYPES[self.dtype], self.spatial_compression
        frames = latent_frames(num_frames, compression=self.temporal_compression, causal=self.causal)
        runs = stored_runs(self.kinds, num_frames=num_frames, temporal_compression=self.temporal_compression, causal=self.causal)
        counts = [(None, frames), *(((run.start, run.count), run.latent_count) for run in runs)]
        return {
            name: (dtype, (self.latent_channels, count, height // unit, width // unit))
            for run, count in counts
            for name in latent_names(self.latents, run)
        }

    @lru_cache(maxsize=4096)  # noqa: B019
    def _latents_size(self, num_frames: int, height: int, width: int) -> int:
        return safetensors_size(self._latents(num_frames, height, width))

    def member_sizes(self, clip: PlannedClip) -> dict[str, int]:
        """Bytes of each member of a clip's sample."""
        sizes: dict[str, int] = {}
        if self.store != "text":
            sizes[MEMBERS[0]] = self._latents_size(clip.num_frames, clip.height, clip.width)
        if self.store != "latents":
            sizes[MEMBERS[1]] = _text_size(clip.text_tokens, self.text_dim, self.vec_dim, self.dtype)
        sizes[MEMBERS[2]] = len(facts_json(clip))
        return sizes


def layout_for(
    *,
    store: Store,
    latents: Latents,
    kinds: Sequence[str],
    model: ModelConfig,
    temporal_compression: int,
    causal: bool,
    spatial_compression: int,
    dtype: Literal["fp32", "bf16"],
) -> CacheLayout:
    """The layout of a run's cache."""
    return CacheLayout(
        store=store,
        latents=latents,
        kinds=tuple(kinds),
        latent_channels=model.latent_channels,
        temporal_compression=temporal_compression,
        causal=causal,
        spatial_compression=spatial_compression,
        text_dim=model.text_dim,
        vec_dim=model.vec_dim,
        dtype=dtype,
    )


def text_layout(text_tokens: int, *, text_dim: int, vec_dim: int, dtype: torch.dtype) -> Layout:
    """T5 tokens and CLIP vector of one caption."""
    return {"t5": (dtype, (text_tokens, text_dim)), "clip": (dtype, (vec_dim,))}


@lru_cache(maxsize=64)
def _text_size(text_tokens: int, text_dim: int, vec_dim: int, dtype: str) -> int:
    return safetensors_size(text_layout(text_tokens, text_dim=text_dim, vec_dim=vec_dim, dtype=TORCH_DTYPES[dtype]))


def caption_of(clip: PlannedClip) -> str:
    """The caption a planned clip trains with."""
    return training_caption(clip.clip.text, fps=clip.named_fps, motion_score=clip.clip.motion_score)


def facts_json(clip: PlannedClip, *, offset: int = 0) -> bytes:
    """The JSON member: what the sample is, for people and other readers.

    Args:
        clip: the planned clip.
        offset: first of its frames that was encoded; the length does not depend on it.
    """
    start = clip.clip.start_frame
    facts = {
        "key": key_of_clip(clip),
        "id": clip.clip.id,
        "row": clip.clip.row,
        "caption": caption_of(clip),
        "num_frames": clip.num_frames,
        "height": clip.height,
        "width": clip.width,
        "start_frame": start + offset,
        "stride": clip.stride,
        "fps": clip.fps,
    }
    room = len(str(start + clip.num_starts - 1)) - len(str(start + offset))
    return (json.dumps(facts, sort_keys=True) + " " * room).encode()


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """What a cache takes on disk when no clip fails."""

    samples: int
    shards: int
    samples_per_shard: int
    latents_bytes: int
    text_bytes: int
    other_bytes: int
    """JSON members, tar headers and padding; the indices are not counted (about 140 bytes a sample)."""
    shard_bytes: tuple[int, ...]
    """Of each tar."""

    @property
    def total_bytes(self) -> int:
        """Of all tars."""
        return sum(self.shard_bytes)

    @property
    def line(self) -> str:
        """One line for people."""
        parts: Mapping[str, int] = {"latents": self.latents_bytes, "text": self.text_bytes, "other": self.other_bytes}
        shares = ", ".join(f"{name} {readable_bytes(value)} ({value / self.total_bytes:.0%})" for name, value in parts.items())
        return (
            f"{self.samples:,} samples in {self.shards:,} shards of {self.samples_per_shard:,}: {readable_bytes(self.total_bytes)} "
            f"({readable_bytes(self.total_bytes / self.samples)} a sample); {shares}"
        )


def readable_bytes(num_bytes: float) -> str:
    """'3.21 GB'."""
    unit, name = next(((unit, name) for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if num_bytes >= unit), (1e3, "kB"))
    return f"{num_bytes / unit:,.2f} {name}"


def cache_size(clips: Sequence[PlannedClip], layout: CacheLayout, *, samples_per_shard: int) -> CacheSize:
    """Exact bytes of a cache of these clips."""
    members = [layout.member_sizes(clip) for clip in clips]
    sums = {name: sum(sizes.get(name, 0) for sizes in members) for name in MEMBERS}
    of_samples = [tar_bytes(list(sizes.values())) for sizes in members]
    starts = range(0, len(clips), samples_per_shard)
    shard_bytes = tuple(sum(of_samples[start : start + samples_per_shard]) + END_BYTES for start in starts)
    return CacheSize(
        samples=len(clips),
        shards=len(shard_bytes),
        samples_per_shard=samples_per_shard,
        latents_bytes=sums[MEMBERS[0]],
        text_bytes=sums[MEMBERS[1]],
        other_bytes=sum(shard_bytes) - sums[MEMBERS[0]] - sums[MEMBERS[1]],
        shard_bytes=shard_bytes,
    )

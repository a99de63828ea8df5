"""What `megasora data encode` is asked for and what it answers. Imports nothing heavy: the command line makes its flags from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from megasora.data.cache.layout import CacheSize

OnProgress = Callable[[int, int, int], None]
"""Called with (clips done, clips in all, bytes written) of this task."""


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Latents and text of every planned clip, encoded once into WebDataset shards that `--data.cache` reads."""

    output: Path
    """Folder of the cache."""
    store: Literal["latents", "text", "both"] = "both"
    """What is stored; training encodes the rest on the way."""
    latents: Literal["mean_std", "sampled"] = "mean_std"
    """mean_std: the posterior, from which training takes the mean or draws (encoders.posterior); sampled: one sample drawn now, half as
    large, the same in every epoch."""
    conditions: Literal["recipe", "all"] = "recipe"
    """Condition frames that are stored, encoded on their own: for the kinds the run gives a weight above 0, or for all kinds."""
    shard: str | None = None
    """i/n: make the shards k with k % n = i. None takes SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, or 0/1 without them."""
    samples_per_shard: int = 512
    """Planned clips of a shard (512 of 256px and 129 frames with text are about 3.5 GB)."""
    verify: bool = False
    """Read finished shards and compare their SHA-256; damaged ones are made again."""


@dataclass(frozen=True, kw_only=True)
class TeacherEncodeSettings:
    """A teacher's features of every planned clip of a run of train-ae, stored once in shards that `--distillation.cache` reads."""

    output: Path
    """Folder of the cache."""
    shard: str | None = None
    """i/n: make the shards k with k % n = i. None takes SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, or 0/1 without them."""
    samples_per_shard: int = 256
    """Planned clips of a shard (256 of 256px and 32 frames at stages.3 are 2.1 GB)."""
    verify: bool = False
    """Read finished shards and compare their SHA-256; damaged ones are made again."""


@dataclass(frozen=True, kw_only=True)
class ShardsResult:
    """What a task did."""

    output: str
    made: tuple[int, ...]
    """Shards this task wrote."""
    kept: tuple[int, ...]
    """Shards of this task that were finished before."""
    missing: tuple[int, ...]
    """Shards of other tasks that are not finished yet."""
    samples: int
    """Planned clips in the shards this task wrote."""
    failed: int
    """Of them, clips that could not be encoded; the reasons are in the shards' failed.jsonl."""
    unplanned: int
    """Rows of the manifest that fit no shape; the reasons are in unplanned.jsonl."""
    bytes_written: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EncodeResult(ShardsResult):
    """What a task of a cache of latents and text did."""

    size: CacheSize
    """Of the whole cache."""

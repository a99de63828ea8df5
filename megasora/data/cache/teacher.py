"""A cache of a teacher's features (latent distillation): what it was made from, what a sample of it is, and reading it.

Its shards are those of any cache; the first member of a sample holds `features` [D, t, h, w] of the clip and, where a run also takes clips'
first frames alone, `image` [D, 1, h, w] of that. A cache serves clips that are the same each time only: one beginning, one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.errors import UserError
from megasora.config.schema import Dtype
from megasora.data.cache.identity import differences, encoder_facts, read_facts_of
from megasora.data.cache.reading import Cache, refuse_incomplete
from megasora.data.cache.shards import BadSampleError, Layout
from megasora.data.plan import PlannedClip

FORMAT = "megasora-teacher-cache-1"
WHOLE, IMAGE = "features", "image"
DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class TeacherCacheSettings:
    """What decides what the cache holds; a run that reads it must agree in all of it."""

    teacher_sha256: str
    """Of the teacher's files."""
    channels: int
    layer: str
    place: tuple[int, int]
    """(frames, pixels) of a place of the aligned layer."""
    frames: Literal["mean", "first"]
    teacher_px: int | None
    normalisation: Literal["imagenet", "none"]
    dtype: Dtype
    """In which the teacher ran, and its features are stored: what it gives a run on the way is the same to the bit."""
    images: bool
    """Whether first frames alone are stored too."""
    samples_per_shard: int
    samples: int
    """Planned clips."""
    manifest_sha256: str
    resolution: str
    aspect: Literal["square", "nearest"]
    frame_counts: tuple[int, ...]
    target_fps: float
    compression: tuple[int, int]
    """(frames, pixels) of the autoencoder's latent, with which clips are planned."""

    @property
    def num_shards(self) -> int:
        """Shards of the whole cache."""
        return -(-self.samples // self.samples_per_shard)

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Places (t, h, w) of a clip's aligned layer."""
        frames, pixels = self.place
        return max(1, num_frames // frames), height // pixels, width // pixels

    def layout(self, clip: PlannedClip) -> Layout:
        """Tensors of a sample."""
        dtype, (t, h, w) = DTYPES[self.dtype], self.grid(clip.num_frames, clip.height, clip.width)
        found = {WHOLE: (dtype, (self.channels, t, h, w))}
        if self.images and clip.num_frames > 1:
            found[IMAGE] = (dtype, (self.channels, 1, h, w))
        return found


@dataclass(frozen=True, kw_only=True)
class TeacherCacheFacts:
    """What cache.json says."""

    format: str
    settings: TeacherCacheSettings
    decoder: str
    """Identity of what decoded the clips."""
    versions: tuple[tuple[str, str], ...]
    """Libraries that made it."""


def teacher_settings(
    config: AutoencoderRunConfig, *, channels: int, teacher_sha256: str, samples: int, samples_per_shard: int, manifest_sha256: str
) -> TeacherCacheSettings:
    """Of the cache that a run would write."""
    data, distillation, autoencoder = config.data, config.distillation, config.autoencoder
    return TeacherCacheSettings(
        teacher_sha256=teacher_sha256,
        channels=channels,
        layer=distillation.layer,
        place=autoencoder.sizes.compression_after(distillation.stage),
        frames=distillation.frames,
        teacher_px=distillation.teacher_px,
        normalisation=distillation.normalisation,
        dtype=config.precision.dtype,
        images=data.image_share > 0,
        samples_per_shard=samples_per_shard,
        samples=samples,
        manifest_sha256=manifest_sha256,
        resolution=data.resolution,
        aspect=data.aspect,
        frame_counts=data.frame_counts,
        target_fps=data.target_fps,
        compression=(autoencoder.temporal_compression, autoencoder.spatial_compression),
    )


def read_teacher_facts(folder: Path) -> TeacherCacheFacts:
    """Read cache.json.

    Raises:
        UserError: the folder is no such cache.
    """
    return read_facts_of(folder, TeacherCacheFacts, written_as=FORMAT)


def check_teacher_cache(config: AutoencoderRunConfig, *, manifest_sha256: str) -> None:
    """Refuse a cache that does not fit a run: made of other clips, settings or another teacher, or unfinished.

    A run without a teacher's folder takes the cache's; with one, its files are compared.

    Raises:
        UserError: says what differs.
    """
    folder = Path(str(config.distillation.cache))
    facts = read_teacher_facts(folder)
    theirs, teacher = facts.settings, config.distillation.teacher
    ours = teacher_settings(
        config,
        channels=theirs.channels,
        teacher_sha256=theirs.teacher_sha256 if teacher is None else encoder_facts(teacher).sha256,
        samples=theirs.samples,  # which clips fit is a function of the rest
        samples_per_shard=theirs.samples_per_shard,
        manifest_sha256=manifest_sha256,
    )
    found = differences(ours, theirs, leave_out=("images",) if theirs.images else ())
    if found:
        raise UserError(
            f"distillation.cache {folder} does not fit this run: {'; '.join(found)}; use the settings it was made with, or encode again"
        )
    refuse_incomplete(folder, facts)


class TeacherCache:
    """A finished cache of a run's planned clips; threads may share it.

    Args:
        folder: of the cache; `check_teacher_cache` has passed it.
        clips: of the run.

    Raises:
        UserError: a clip, in the shape it trains at, is not there.
    """

    def __init__(self, folder: Path, clips: Sequence[PlannedClip]) -> None:
        self.facts = read_teacher_facts(folder)
        self._cache = Cache(folder, facts=self.facts)
        self._places = self._cache.places_of(clips)

    @property
    def channels(self) -> int:
        """Of the teacher."""
        return self.facts.settings.channels

    def features(self, sample: int, *, image: bool) -> Tensor | str:
        """[D, t, h, w] on the CPU of a planned clip, or of its first frame alone; or why there are none."""
        try:
            found = self._cache.read(int(self._places[sample]), slice(0, 1))
        except BadSampleError as error:
            return f"teacher's features: {error}"
        return found[IMAGE if image else WHOLE]

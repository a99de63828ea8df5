"""The clips that go through: rows of a manifest, the files of a folder, or one file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av

from megasora.config.errors import UserError
from megasora.data.buckets import stride_to
from megasora.data.decoding.contract import DecodeRequest
from megasora.data.manifest import read_manifest
from megasora.evaluation.autoencoders.settings import Shape
from megasora.evaluation.files import ENDINGS, clips_in

TABLES = (".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class SourceClip:
    """Where a clip's frames come from."""

    name: str
    path: Path
    start: int = 0
    """Its first frame in the file."""
    num_frames: int | None = None
    """None: to the file's end."""
    crop: tuple[int, int, int, int] | None = None
    fps: Callable[[], float] | None = None
    """Its rate; None where the file is to be asked."""

    def stride(self, fps: float | None) -> int:
        """Frames of the file per frame of the clip, so that its rate does not exceed `fps`; 1 for None.

        Raises:
            OSError: the file does not open.
        """
        if fps is None:
            return 1
        return stride_to(_rate_of(self.path) if self.fps is None else self.fps(), target_fps=fps)

    def request(self, shape: Shape, *, fps: float | None) -> DecodeRequest:
        """What to decode: from its first frame on, sized to cover and cut to the centre.

        Raises:
            ValueError: it is too short.
            OSError: the file does not open.
        """
        stride = self.stride(fps) if shape.num_frames > 1 else 1
        needed = (shape.num_frames - 1) * stride + 1
        if self.num_frames is not None and self.num_frames < needed:
            raise ValueError(f"{self.num_frames} frames, {needed} are needed for {shape.num_frames} at stride {stride}")
        return DecodeRequest(
            path=str(self.path),
            start=self.start,
            stride=stride,
            num_frames=shape.num_frames,
            height=shape.height,
            width=shape.width,
            crop=self.crop,
            clip_id=self.name,
        )


def find_clips(path: Path, *, limit: int | None) -> tuple[tuple[SourceClip, ...], tuple[str, ...]]:
    """(clips, a line about every row of a manifest that is none).

    Args:
        path: a manifest (csv or parquet), a folder, or one clip.
        limit: the first so many only; None takes all.

    Raises:
        UserError: it is nothing of that, or holds no clip.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no clip; use 1 or more, or leave it out")
    skipped: tuple[str, ...] = ()
    if path.suffix in TABLES:
        manifest = read_manifest(path)
        skipped = tuple(f"row {row.row}: {row.reason}" for row in manifest.skipped)
        alike = Counter(clip.id for clip in manifest.clips)
        clips = [
            SourceClip(
                name=f"{Path(clip.path).stem} [{clip.id if alike[clip.id] == 1 else f'row {clip.row}'}]",
                path=Path(clip.path),
                start=clip.start_frame,
                num_frames=clip.num_frames,
                crop=clip.crop,
                fps=_always(clip.fps),
            )
            for clip in manifest.clips
        ]
    elif path.is_file():
        clips = [SourceClip(name=path.stem, path=path)]
    elif path.is_dir():
        clips = [SourceClip(name=name, path=file) for name, file in clips_in(path).items()]
    else:
        raise UserError(f"--clips {path} is no manifest (csv, parquet), no folder and no clip ({', '.join(ENDINGS)})")
    return tuple(clips[:limit]), skipped


def _always(fps: float) -> Callable[[], float]:
    return lambda: fps


def _rate_of(path: Path) -> float:
    """Frames per second as the file's header says; nan where it says nothing."""
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate if container.streams.video else None
        return math.nan if rate is None else float(rate)

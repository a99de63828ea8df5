"""Clips as files: what a folder holds, how many frames a file has, and its pixels a run of frames at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
from torch import Tensor

from megasora.config.errors import UserError
from megasora.data.decoding.contract import DecodeError, DecodeRequest
from megasora.data.decoding.pyav import PyAVDecoder, video_facts
from megasora.media.numbering import ONE_FRAME_PER_PACKET, MissingFrameError, numbered_frames

ENDINGS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif", ".png", ".jpg", ".jpeg", ".webp")
"""Files that count as clips; pictures are clips of one frame."""
RUN_BYTES = 256 << 20
"""Pixels decoded at a time; a longer clip is read in several runs."""


@dataclass(frozen=True, kw_only=True)
class ClipFacts:
    """What a file's packets say."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames} frames of {self.height}x{self.width}"


def clips_in(folder: Path) -> dict[str, Path]:
    """Clips of a folder and the folders in it, by their path there without the ending, in that order.

    Raises:
        UserError: no folder, no clip in it, or two clips that differ in their ending only.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of clips")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() not in ENDINGS or not path.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        name = str(inside)[: -len(path.suffix)]
        if name in found:
            raise UserError(f"{path} and {found[name]} have one name; keep one of them")
        found[name] = path
    if not found:
        raise UserError(f"{folder} holds no clip ({', '.join(ENDINGS)})")
    return found


def clip_facts(path: Path) -> ClipFacts:
    """Frames and size of a clip that is stored as it is shown. Frames are counted, a header's number is not believed.

    Raises:
        DecodeError: not to be read, without a frame, or stored turned or with pixels that are not square.
    """
    facts = video_facts(str(path))
    if not facts.shown_as_stored:
        raise DecodeError(f"{path} is stored turned or with pixels that are not square; encode it again as it is shown")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if facts.codec in ONE_FRAME_PER_PACKET:
                count = sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
            else:
                count = sum(1 for _ in numbered_frames(container, stream, start=0, seek=False, deadline=math.inf))
    except (av.error.FFmpegError, OSError, ValueError, MissingFrameError) as error:
        raise DecodeError(f"{path}: {error}") from error
    if not count:
        raise DecodeError(f"{path}: no frame")
    return ClipFacts(num_frames=count, height=facts.height, width=facts.width)


def runs_of_frames(path: Path, facts: ClipFacts, *, run_bytes: int = RUN_BYTES) -> Iterator[Tensor]:
    """The clip's pixels [3, frames, height, width] as uint8, in order, so many frames at a time as `run_bytes` hold.

    Raises:
        DecodeError: a frame is missing or corrupt.
    """
    step = max(1, run_bytes // (3 * facts.height * facts.width))
    for start in range(0, facts.num_frames, step):
        request = DecodeRequest(
            path=str(path),
            start=start,
            stride=1,
            num_frames=min(step, facts.num_frames - start),
            height=facts.height,
            width=facts.width,
        )
        yield PyAVDecoder().pixels(request)

"""Frames of a clip for the filters: numbered, checked for damage, and small copies of them. Needs FFmpeg only, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from megasora.media.numbering import LostCountError, MissingFrameError, Spoilage, numbered_frames


class DamagedClipError(Exception):
    """A frame cannot be read; the message is the reason, `frame` the number of the first one lost."""

    def __init__(self, reason: str, *, frame: int) -> None:
        super().__init__(reason)
        self.frame = frame


@dataclass(frozen=True, kw_only=True)
class Span:
    """Frames [start, end) of a file, and the part of the picture that counts."""

    path: str
    start: int
    end: int
    crop: tuple[int, int, int, int] | None = None
    """(x, y, width, height) in pixels as stored."""

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Span:
        """The span of a row of a shots or probe table."""
        start = int(row.get("start_frame") or 0)
        crop = None
        if row.get("crop_w") is not None:
            crop = (int(row["crop_x"]), int(row["crop_y"]), int(row["crop_w"]), int(row["crop_h"]))
        end = int(row.get("end_frame") or start + int(row["num_frames"]))
        return cls(path=str(row["path"]), start=start, end=end, crop=crop)


def read_frames(span: Span) -> Iterator[tuple[int, av.VideoFrame]]:
    """(number, frame) of a span, in order; the numbers and pictures are those that the training decoder gives.

    Raises:
        DamagedClipError: a frame is corrupt (also one before the start that later ones are predicted from), or the file ends early.
    """
    yielded = False
    try:
        for number, frame in _read(span, seek=True):
            yielded = True
            yield number, frame
        return
    except LostCountError as error:
        if yielded:  # what came before it is in use
            raise DamagedClipError(f"after frame {number}: {error}", frame=number + 1) from error
    yield from _read(span, seek=False)


def _read(span: Span, *, seek: bool) -> Iterator[tuple[int, av.VideoFrame]]:
    number = span.start
    spoilage = Spoilage()
    try:
        with av.open(span.path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"  # one core per worker process
            for number, frame in numbered_frames(container, stream, start=span.start, seek=seek, deadline=math.inf):
                spoiled = spoilage.of(number, frame)
                if number < span.start:
                    continue
                if spoiled is not None:
                    raise DamagedClipError(f"frame {spoiled} is corrupt", frame=spoiled)
                yield number, frame
                if number + 1 >= span.end:
                    return
    except MissingFrameError as error:
        raise DamagedClipError(str(error), frame=error.frame) from error
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DamagedClipError(f"after frame {number}: {reason.splitlines()[0]}", frame=number + 1) from error
    raise DamagedClipError(f"ends after frame {number} instead of {span.end - 1}", frame=number + 1)


class SmallFrames:
    """Makes small BGR copies of frames: cropped, at most `long_side` pixels, averaged over areas."""

    def __init__(self, *, long_side: int, crop: tuple[int, int, int, int] | None) -> None:
        self.long_side, self.crop = long_side, crop
        self._scaler = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """uint8 [height, width, 3]."""
        scale = min(1.0, self.long_side / max(frame.width, frame.height))
        width, height = max(2, round(frame.width * scale)), max(2, round(frame.height * scale))
        scaled = self._scaler.reformat(frame, width=width, height=height, format="bgr24", interpolation=Interpolation.AREA)
        small = np.asarray(scaled.to_ndarray(), np.uint8)
        if self.crop is None:
            return small
        x, y, w, h = (round(edge * scale) for edge in self.crop)
        return np.ascontiguousarray(small[y : y + max(1, h), x : x + max(1, w)])


def full_bgr(frame: av.VideoFrame, crop: tuple[int, int, int, int] | None) -> NDArray[np.uint8]:
    """uint8 [height, width, 3] of the part that counts, at its own size."""
    pixels = frame.to_ndarray(format="bgr24")
    if crop is None:
        return pixels
    x, y, width, height = crop
    return np.ascontiguousarray(pixels[y : y + height, x : x + width])


def evenly(start: int, end: int, count: int) -> tuple[int, ...]:
    """At most `count` frame numbers spread over [start, end), the middles of equal parts."""
    length = end - start
    return tuple(sorted({start + (2 * k + 1) * length // (2 * count) for k in range(count)})) if length > 0 else ()


class FilterGraph:
    """A chain of libavfilter filters that is fed frames and gives their metadata."""

    def __init__(self, frame: av.VideoFrame, filters: list[tuple[str, str]], *, crop: tuple[int, int, int, int] | None = None) -> None:
        self._graph = av.filter.Graph()
        chain = [
            self._graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base),
            *((self._graph.add("crop", "{2}:{3}:{0}:{1}:exact=1".format(*crop)),) if crop else ()),
            *(self._graph.add(name, arguments) for name, arguments in filters),
            self._graph.add("buffersink"),
        ]
        self._graph.link_nodes(*chain).configure()

    def metadata(self, frame: av.VideoFrame) -> dict[str, str]:
        """Metadata the filters give this frame."""
        self._graph.push(frame)
        return dict(self._graph.pull().metadata)

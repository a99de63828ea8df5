"""How stored pictures are to be shown: turned, mirrored, with pixels that are not square. Takes PyAV's objects, imports nothing heavy."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import av

SQUARE_TOLERANCE = 0.01
"""Pixels whose aspect is off by no more count as square. Encoders write such aspects (1281:1280) to make up for sizes rounded to whole or
even pixels, and our own rounding of sizes does no better: half a pixel of 50. Of the aspects that standards name (H.264, table E-1) the
nearest to 1 are 12:11 and 10:11, off by 9 %."""

_OFF_AXIS = 0.0175
"""Sine of 1 degree: FFmpeg's command takes a turn within a degree of a quarter turn for one."""


class OddTurnError(ValueError):
    """A picture is to be shown turned by something else than quarter turns."""


def pixel_aspect(stream: av.VideoStream) -> float:
    """Width of a pixel / its height as container or codec say; 1 when they do not (FFmpeg's 0/1)."""
    ratio = stream.sample_aspect_ratio
    return float(ratio) if ratio else 1.0


def is_square(aspect: float) -> bool:
    """Whether pixels of this aspect count as square."""
    return abs(aspect - 1) <= SQUARE_TOLERANCE


def upright_filters(frame: av.VideoFrame) -> tuple[tuple[str, str], ...]:
    """libavfilter's filters (name, arguments) that show a frame as its display matrix asks; none for nearly every file.

    The display matrix takes a point (x, y) of the stored picture, y downwards, to (a x + c y, b x + d y); it comes from the container, from
    H.264's and HEVC's display orientation, or from EXIF. The choice of filters is that of FFmpeg's command (fftools/ffmpeg_filter.c). A
    matrix of zeros, which some muxers write, means nothing there and here.

    Raises:
        OddTurnError: the picture is turned by something else than quarter turns.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return ()
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if max(abs(b), abs(c)) <= _OFF_AXIS * straight:
        return (*((("hflip", ""),) if a < 0 else ()), *((("vflip", ""),) if d < 0 else ()))
    if max(abs(a), abs(d)) <= _OFF_AXIS * crossed:
        turn = {(True, False): "cclock", (False, True): "clock", (True, True): "cclock_flip", (False, False): "clock_flip"}
        return (("transpose", turn[c > 0, b > 0]),)
    raise OddTurnError(f"it is to be shown turned by {frame.rotation} degrees, which is no quarter turn; re-encode it upright")


def swaps_sides(filters: tuple[tuple[str, str], ...]) -> bool:
    """Whether `upright_filters` make height width."""
    return any(name == "transpose" for name, _ in filters)

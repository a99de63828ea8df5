"""The decode contract: a frame range at a stride, cut, resized, normalised to [-1, 1], exactly as many frames as asked, or an error.

Two decoders keep it: PyAV (everything, on the CPU) and DALI (NVDEC on a GPU; VP8, VP9 and MJPEG on the CPU). They differ by a level or so
per pixel, so one run uses one decoder unless `mixed` is asked for; what decoded is recorded as `Decoder.identity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

DECODE_TIMEOUT_S = 120.0
"""A clip that takes longer is given up: 129 frames of 4K video take some seconds on one core, so only a hanging file comes near it."""


class DecodeError(Exception):
    """A clip cannot be decoded as asked; the message is the reason. The clip is skipped and counted, never padded."""


Decoded = Tensor | DecodeError
"""What became of a request."""


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """Frames of a file at a size, as they are to be shown: upright, with square pixels."""

    path: str
    start: int
    stride: int
    num_frames: int
    height: int
    width: int
    crop: tuple[int, int, int, int] | None = None
    """(x, y, width, height) in pixels as stored, cut first; then turn upright, resize to cover and cut the centre."""
    span: int | None = None
    """Frames of the file over which the clip's are spread evenly, first and last included; None takes start, start + stride, ..."""
    clip_id: str = field(default="", compare=False)
    """Whose frames they are; a file may hold several clips."""

    @property
    def frames(self) -> NDArray[np.int64]:
        """Numbers in the file of the wanted frames, ascending (spread as hpcaitech/Open-Sora opensora/datasets/utils.py,
        temporal_random_crop, spreads them)."""
        if self.span is None:
            return self.start + self.stride * np.arange(self.num_frames)
        return np.linspace(self.start, self.start + self.span - 1, self.num_frames, dtype=np.int64)


class Decoder(Protocol):
    """Turns a request into pixels; threads may share it."""

    @property
    def identity(self) -> str:
        """Name and library versions, which say what pixels a request gives: 'pyav 18.1.0 libavcodec 62.28 libswscale 9.5'."""
        ...

    def decode(self, request: DecodeRequest) -> Float[Tensor, "3 frames height width"]:
        """RGB in [-1, 1], fp32.

        Raises:
            DecodeError: the file is broken, too short, or took too long.
        """
        ...

    def pixels(self, request: DecodeRequest) -> UInt8[Tensor, "3 frames height width"]:
        """The same before `normalise`: a quarter of the memory, for a queue and for the way to a device.

        Raises:
            DecodeError: as `decode`.
        """
        ...


@runtime_checkable
class BatchDecoder(Decoder, Protocol):
    """A decoder that works on several requests at once better than on one after another."""

    @property
    def batch_size(self) -> int:
        """Requests worth handing over together."""
        ...

    def pixels_many(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        """`pixels` or the error of each request, in order; one bad file costs only itself."""
        ...


def normalise(pixels: UInt8[Tensor, "3 frames height width"]) -> Float[Tensor, "3 frames height width"]:
    """Levels 0 to 255 as fp32 in [-1, 1], where the pixels are; on the CPU bit for bit what `Decoder.decode` gives.

    CUDA may divide by multiplying with the reciprocal, so paths that must agree bit for bit normalise on the same kind of device.
    """
    return pixels.float().div_(127.5).sub_(1.0)


def covering_size(source: tuple[float, float], target: tuple[int, int]) -> tuple[int, int]:
    """Smallest (height, width) with the source's aspect that covers the target."""
    scale = max(target[0] / source[0], target[1] / source[1])
    return max(target[0], round(source[0] * scale)), max(target[1], round(source[1] * scale))


def check_crop(request: DecodeRequest, *, height: int, width: int) -> None:
    """Refuse a crop that leaves the source picture.

    Raises:
        DecodeError: it does.
    """
    if request.crop is not None:
        x, y, crop_width, crop_height = request.crop
        if min(x, y) < 0 or min(crop_width, crop_height) < 1 or x + crop_width > width or y + crop_height > height:
            raise DecodeError(f"{request.path}: crop {request.crop} lies outside {width}x{height}")


def check_count(request: DecodeRequest, *, num_frames: int) -> None:
    """Refuse a short read.

    Raises:
        DecodeError: fewer frames came than were asked for.
    """
    if num_frames != request.num_frames:
        wanted = f"{num_frames} of {request.num_frames} frames from {request.start} at stride {request.stride}"
        raise DecodeError(f"{request.path}: {wanted}")

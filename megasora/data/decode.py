"""The decode contract: a frame range at a stride, cut, resized, normalised to [-1, 1], exactly as many frames as asked, or an error.

Two decoders keep it: PyAV (everything, on the CPU) and DALI (NVDEC on a GPU; VP8, VP9 and MJPEG on the CPU). They differ by a level or so
per pixel, so one run uses one decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor


class DecodeError(Exception):
    """A clip cannot be decoded as asked; the message is the reason. The clip is skipped and counted, never padded."""


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """Frames start, start + stride, ... of a file, at a size."""

    path: str
    start: int
    stride: int
    num_frames: int
    height: int
    width: int
    crop: tuple[int, int, int, int] | None = None
    """(x, y, width, height) in source pixels, cut first; then resize to cover and cut the centre."""


class Decoder(Protocol):
    """Turns a request into pixels."""

    def decode(self, request: DecodeRequest) -> Float[Tensor, "3 frames height width"]:
        """RGB in [-1, 1], fp32.

        Raises:
            DecodeError: the file is broken or too short.
        """
        ...


def covering_size(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Smallest (height, width) with the source's aspect that covers the target."""
    scale = max(target[0] / source[0], target[1] / source[1])
    return max(target[0], round(source[0] * scale)), max(target[1], round(source[1] * scale))

"""Decoding with PyAV on the CPU: every codec of its FFmpeg, images included. Corrupt frames are errors, not pictures."""

from __future__ import annotations

from collections.abc import Iterator

import av
import numpy as np
import torch
from torch import Tensor

from megasora.data.decode import DecodeError, DecodeRequest, covering_size

_SEEK_MARGIN_FRAMES = 64
"""A seek pays when at least so many frames lie before the start; container time stamps find the key frame."""


class PyAVDecoder:
    """Decoder for the CPU. Stateless, so threads may share it."""

    def decode(self, request: DecodeRequest) -> Tensor:
        """See `Decoder.decode`."""
        wanted = range(request.start, request.start + request.stride * request.num_frames, request.stride)
        frames: list[np.ndarray] = []
        try:
            with av.open(request.path) as container:
                if not container.streams.video:
                    raise DecodeError(f"{request.path}: no video stream")
                stream = container.streams.video[0]
                stream.thread_type = "SLICE"
                for number, frame in _numbered(container, stream, start=request.start):
                    if number > wanted[-1]:
                        break
                    if number < request.start:
                        continue
                    if frame.is_corrupt:  # also between strides: later frames are predicted from it
                        raise DecodeError(f"{request.path}: frame {number} is corrupt")
                    if (number - request.start) % request.stride == 0:
                        frames.append(_to_size(frame, request))
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise DecodeError(f"{request.path}: {error}") from error
        if len(frames) != request.num_frames:
            raise DecodeError(
                f"{request.path}: {len(frames)} of {request.num_frames} frames from {request.start} at stride {request.stride}"
            )
        pixels = torch.from_numpy(np.stack(frames))
        return pixels.permute(3, 0, 1, 2).float().div_(127.5).sub_(1.0)


def _numbered(container: av.container.InputContainer, stream: av.VideoStream, *, start: int) -> Iterator[tuple[int, av.VideoFrame]]:
    """(frame number, frame); seeks to the key frame before a late start where time stamps allow counting from it."""
    rate, base = stream.average_rate, stream.time_base
    if start < _SEEK_MARGIN_FRAMES or not rate or not base:
        yield from enumerate(container.decode(stream))
        return
    origin = stream.start_time or 0
    container.seek(origin + int(start / rate / base), stream=stream)
    for frame in container.decode(stream):
        if frame.pts is None:
            raise DecodeError("frames carry no time stamps, so a frame number cannot be found")
        yield round((frame.pts - origin) * base * rate), frame


def _to_size(frame: av.VideoFrame, request: DecodeRequest) -> np.ndarray:
    """uint8 [height, width, 3]: crop, resize to cover (bicubic), cut the centre."""
    image = frame
    if request.crop is not None:
        x, y, width, height = request.crop
        pixels = frame.to_ndarray(format="rgb24")[y : y + height, x : x + width]
        if pixels.shape[:2] != (height, width):
            raise DecodeError(f"{request.path}: crop {request.crop} lies outside {frame.width}x{frame.height}")
        image = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    target = (request.height, request.width)
    height, width = covering_size((image.height, image.width), target)
    resized = image.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC").to_ndarray()
    top, left = (height - target[0]) // 2, (width - target[1]) // 2
    return np.ascontiguousarray(resized[top : top + target[0], left : left + target[1]])

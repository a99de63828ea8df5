"""Decoding with PyAV on the CPU: every codec of its FFmpeg, images included. Corrupt frames are errors, not pictures.

A clip is decoded by one thread and clips run beside each other (`loader`): per CPU second that is the fastest (benchmarks/decode.py), and
the bytes depend on the request alone, never on a thread count or on the key frame the read began at.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from megasora.data.decoding.contract import DECODE_TIMEOUT_S, DecodeError, DecodeRequest, check_count, check_crop, covering_size
from megasora.media.display import is_square, pixel_aspect, swaps_sides, upright_filters
from megasora.media.numbering import LostCountError, MissingFrameError, Spoilage, numbered_frames

_BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
"""Bicubic at every size: without accurate rounding swscale takes the nearest chroma where nothing is resized. Bit-exact between kinds of
processor, as FFmpeg's own tests ask for."""


_Pixels = NDArray[np.float32] | NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What a file's header and first frame say of its video stream."""

    codec: str
    """FFmpeg's name of the format: h264, vp9, av1, png."""
    pixel_format: str
    height: int
    width: int
    """Pixels as stored."""
    pixel_aspect: float = 1.0
    """Width of a pixel / its height."""
    turned: bool = False
    """It is to be shown turned or mirrored."""

    @property
    def shown_as_stored(self) -> bool:
        """Neither turned nor of pixels that are not square."""
        return not self.turned and is_square(self.pixel_aspect)


class PyAVDecoder:
    """Decoder for the CPU. Stateless, so threads may share it.

    Args:
        timeout_s: a clip that takes longer is an error.
    """

    def __init__(self, *, timeout_s: float = DECODE_TIMEOUT_S) -> None:
        self.timeout_s = timeout_s

    @property
    def identity(self) -> str:
        """See `Decoder.identity`."""
        versions = (f"{name} {'.'.join(map(str, av.library_versions[name][:2]))}" for name in ("libavcodec", "libswscale"))
        return " ".join((f"pyav {av.__version__}", *versions))

    def decode(self, request: DecodeRequest) -> Tensor:
        """See `Decoder.decode`."""
        return self._decode(request, np.empty(_shape(request), dtype=np.float32))

    def pixels(self, request: DecodeRequest) -> Tensor:
        """See `Decoder.pixels`."""
        return self._decode(request, np.empty(_shape(request), dtype=np.uint8))

    def _decode(self, request: DecodeRequest, target: _Pixels) -> Tensor:
        deadline = time.monotonic() + self.timeout_s
        try:
            try:
                self._read(request, target, deadline=deadline, seek=True)
            except LostCountError:
                self._read(request, target, deadline=deadline, seek=False)
        except MissingFrameError as error:
            raise DecodeError(f"{request.path}: {error}") from error
        except (av.error.FFmpegError, OSError, ValueError) as error:
            reason = self._too_long if time.monotonic() > deadline else error
            raise DecodeError(f"{request.path}: {reason}") from error
        return torch.from_numpy(target)

    @property
    def _too_long(self) -> str:
        return f"decoding took longer than {self.timeout_s:g} s"

    def _read(self, request: DecodeRequest, target: _Pixels, *, deadline: float, seek: bool) -> None:
        wanted = request.frames.tolist()
        done, spoilage = 0, Spoilage()
        with av.open(request.path, timeout=max(deadline - time.monotonic(), 1e-3)) as container:
            stream = _video_stream(container, request.path)
            stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
            resize = _Resize(request, aspect=pixel_aspect(stream))
            for number, frame in numbered_frames(container, stream, start=request.start, seek=seek, deadline=deadline):
                if number > wanted[-1]:
                    break
                spoiled = spoilage.of(number, frame)
                if number < request.start:
                    continue
                if spoiled is not None:  # also between strides: later frames are predicted from it
                    raise DecodeError(f"{request.path}: frame {spoiled} is corrupt")
                if number == wanted[done]:
                    resize.into(target[:, done], frame)
                    done += 1
        check_count(request, num_frames=done)


def _shape(request: DecodeRequest) -> tuple[int, int, int, int]:
    return 3, request.num_frames, request.height, request.width


def video_facts(path: str, *, timeout_s: float = DECODE_TIMEOUT_S) -> VideoFacts:
    """Codec and size of a file, and how it is to be shown.

    The first frame is decoded, since PyAV gives a container's display matrix with frames only: 7 ms at 1920x1080, as long as opening.

    Raises:
        DecodeError: it cannot be opened, has no video, or its first frame cannot be decoded.
    """
    try:
        with av.open(path, timeout=timeout_s) as container:
            stream = _video_stream(container, path)
            context = stream.codec_context
            context.thread_type, context.thread_count = "NONE", 1
            first = next(container.decode(stream), None)
            if first is None:
                raise DecodeError(f"{path}: no frame can be decoded")
            return VideoFacts(
                codec=context.codec.canonical_name,
                pixel_format=context.pix_fmt or "",
                height=context.height,
                width=context.width,
                pixel_aspect=pixel_aspect(stream),
                turned=bool(upright_filters(first)),
            )
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DecodeError(f"{path}: {error}") from error


def frame_count(path: str, *, timeout_s: float = DECODE_TIMEOUT_S) -> int:
    """Frames of a file's video stream: as its header says, or its packets where that says nothing.

    Raises:
        DecodeError: it cannot be read, or has no video.
    """
    try:
        with av.open(path, timeout=timeout_s) as container:
            stream = _video_stream(container, path)
            return int(stream.frames) or sum(packet.size > 0 for packet in container.demux(stream))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DecodeError(f"{path}: {error}") from error


def _video_stream(container: av.container.InputContainer, path: str) -> av.VideoStream:
    if not container.streams.video:
        raise DecodeError(f"{path}: no video stream")
    return container.streams.video[0]


class _Resize:
    """Crop, turn upright, resize to cover (bicubic, antialiased), cut the centre: frames of one request, with one scaler.

    Args:
        request: what is wanted.
        aspect: width of a stored pixel / its height; the result's pixels are square.
    """

    def __init__(self, request: DecodeRequest, *, aspect: float) -> None:
        self._request = request
        self._aspect = 1.0 if is_square(aspect) else aspect
        self._scaler, self._upsampler = VideoReformatter(), VideoReformatter()
        self._graph: tuple[tuple[object, ...], av.filter.Graph] | None = None

    def into(self, target: _Pixels, frame: av.VideoFrame) -> None:
        """Write a frame to `target` [3, height, width] as RGB, levels to uint8 and [-1, 1] to fp32 (while the frame is in the cache).

        Planar RGB keeps the chroma's full resolution and is what `target` needs; swscale's packed rgb24 halves the chroma at even widths
        and takes twice the time.
        """
        turn = upright_filters(frame)
        source = self._cut(frame, turn)
        size = self._request.height, self._request.width
        tall, wide = (self._aspect, 1.0) if swaps_sides(turn) else (1.0, self._aspect)
        height, width = covering_size((source.height * tall, source.width * wide), size)
        scaled = self._scaler.reformat(source, width=width, height=height, format="gbrp", interpolation=_BICUBIC, threads=1)
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        for channel, plane in enumerate((scaled.planes[2], scaled.planes[0], scaled.planes[1])):  # stored as G, B, R
            rows = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)
            target[channel] = rows[top : top + size[0], left : left + size[1]]
        if target.dtype == np.float32:
            np.divide(target, np.float32(127.5), out=target)
            np.subtract(target, np.float32(1), out=target)

    def _cut(self, frame: av.VideoFrame, turn: tuple[tuple[str, str], ...]) -> av.VideoFrame:
        """The crop of a frame, upright. A crop alone is a view of the planes, at most with the chroma brought to full size first."""
        crop = self._request.crop
        if crop is not None:
            check_crop(self._request, height=frame.height, width=frame.width)
        elif not turn:
            return frame
        x, y, width, height = crop or (0, 0, frame.width, frame.height)
        cell = 4 // frame.format.chroma_width(4), 4 // frame.format.chroma_height(4)
        # the cut would move the chroma against the luma, and so would the turn, as chroma stands beside luma on the left
        if x % cell[0] or y % cell[1] or (turn and cell != (1, 1)):
            frame = self._upsampler.reformat(frame, format="yuv444p", interpolation=_BICUBIC, threads=1)
        kind = frame.width, frame.height, frame.format.name, turn
        if self._graph is None or self._graph[0] != kind:  # pictures of a stream may change their size
            self._graph = kind, _graph(frame, [("crop", f"{width}:{height}:{x}:{y}:exact=1"), *turn])
        graph = self._graph[1]
        graph.vpush(frame)
        return graph.vpull()


def _graph(frame: av.VideoFrame, filters: list[tuple[str, str]]) -> av.filter.Graph:
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(source, *(graph.add(name, arguments) for name, arguments in filters), graph.add("buffersink")).configure()
    return graph

"""Decoding with DALI 2.4: NVDEC on a GPU; on the CPU only VP8, VP9 and MJPEG (its CPU build has no H.264 or HEVC decoder).

One clip per pipeline run, with the frame range as arguments. DALI pads short reads with black in silence, so reads ask for
`pad_mode="none"` and the frames that came are counted. After an error the pipeline is rebuilt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.dlpack
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from megasora.data.decode import DecodeError, DecodeRequest, covering_size

CPU_CODECS = ("vp8", "vp9", "mjpeg")
"""Codecs of DALI 2.4's CPU decoder (documentation of fn.decoders.video)."""


class DaliDecoder:
    """Decoder through DALI on one device. Threads may share it: they take turns, for there is one pipeline."""

    def __init__(self, *, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.device_id = (device.index or 0) if self.on_gpu else None
        self._feed: dict[str, Any] = {}
        self._pipeline: Any = None
        self._turn = threading.Lock()

    def decode(self, request: DecodeRequest) -> Tensor:
        """See `Decoder.decode`; on the CPU other codecs than `CPU_CODECS` are refused."""
        self._check_codec(request.path)
        with self._turn:
            pixels = self._read(request)
        if pixels.shape[0] != request.num_frames:
            raise DecodeError(f"{request.path}: {pixels.shape[0]} of {request.num_frames} frames from {request.start}")
        return _to_size(pixels, request)

    def _read(self, request: DecodeRequest) -> Tensor:
        """uint8 [T, H, W, 3]; rebuilds the pipeline after an error."""
        try:
            content = np.fromfile(request.path, dtype=np.uint8)
            self._feed = {
                "content": content,
                "start": np.array(request.start, dtype=np.int32),
                "stride": np.array(request.stride, dtype=np.int32),
                "frames": np.array(request.num_frames, dtype=np.int32),
            }
            if self._pipeline is None:
                self._pipeline = self._build()
            (output,) = self._pipeline.run()
            return torch.utils.dlpack.from_dlpack(output[0]).clone()
        except (RuntimeError, OSError) as error:
            self._pipeline = None
            raise DecodeError(f"{request.path}: {str(error).strip().splitlines()[0]}") from error

    def _check_codec(self, path: str) -> None:
        try:
            with av.open(path) as container:
                codec = container.streams.video[0].codec_context.name if container.streams.video else "none"
        except (av.error.FFmpegError, OSError) as error:
            raise DecodeError(f"{path}: {error}") from error
        if not self.on_gpu and not codec.startswith(tuple(f"{name}" for name in CPU_CODECS)) and "vp" not in codec:
            raise DecodeError(f"{path}: DALI decodes {', '.join(CPU_CODECS)} on the CPU, not {codec}; use --data.decoder pyav")

    def _source(self, name: str) -> Callable[[], Any]:
        return lambda: [self._feed[name]]

    def _build(self) -> Any:
        @pipeline_def(batch_size=1, num_threads=1, device_id=self.device_id, prefetch_queue_depth=1, exec_dynamic=False)  # type: ignore[untyped-decorator]
        def pipeline() -> Any:
            inputs = {
                name: fn.external_source(source=self._source(name), dtype=kind, ndim=dims)
                for name, kind, dims in (
                    ("content", types.UINT8, 1),
                    ("start", types.INT32, 0),
                    ("stride", types.INT32, 0),
                    ("frames", types.INT32, 0),
                )
            }
            return fn.decoders.video(
                inputs["content"],
                device="mixed" if self.on_gpu else "cpu",
                start_frame=inputs["start"],
                stride=inputs["stride"],
                sequence_length=inputs["frames"],
                pad_mode="none",
            )

        built = pipeline()
        built.build()
        return built


def _to_size(pixels: Tensor, request: DecodeRequest) -> Tensor:
    """uint8 [T, H, W, 3] -> fp32 [3, T, height, width] in [-1, 1]: crop, resize to cover (bicubic, antialiased), cut the centre."""
    if request.crop is not None:
        x, y, width, height = request.crop
        if x + width > pixels.shape[2] or y + height > pixels.shape[1]:
            raise DecodeError(f"{request.path}: crop {request.crop} lies outside {pixels.shape[2]}x{pixels.shape[1]}")
        pixels = pixels[:, y : y + height, x : x + width]
    frames = pixels.permute(0, 3, 1, 2).float()
    height, width = covering_size((frames.shape[2], frames.shape[3]), (request.height, request.width))
    frames = F.interpolate(frames, (height, width), mode="bicubic", antialias=True).clamp_(0, 255)
    top, left = (height - request.height) // 2, (width - request.width) // 2
    cut = frames[:, :, top : top + request.height, left : left + request.width]
    return cut.permute(1, 0, 2, 3).contiguous().div_(127.5).sub_(1.0)

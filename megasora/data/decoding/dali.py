"""Decoding with DALI 2.4: NVDEC on a GPU; on the CPU only VP8, VP9 and MJPEG (its CPU build has no H.264 or HEVC decoder).

One pipeline for every shape: each sample brings its frame range, crop and size as arguments; crop and resize (antialiased cubic, like
PyAV's) run in it. DALI works on one sample per thread, so several requests go into one run. It pads short reads with black in
silence, so reads ask for `pad_mode="none"` and the frames that came are counted. After an error the pipeline is rebuilt and the requests
are run one by one, so that a bad file costs only itself.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import nvidia.dali
import torch
import torch.utils.dlpack
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from megasora.data.decoding.contract import (
    DECODE_TIMEOUT_S,
    Decoded,
    DecodeError,
    DecodeRequest,
    check_count,
    check_crop,
    covering_size,
    normalise,
)
from megasora.data.decoding.pyav import PyAVDecoder, VideoFacts, video_facts

CPU_CODECS = ("vp8", "vp9", "mjpeg")
"""Codecs of DALI 2.4's CPU decoder (documentation of fn.decoders.video)."""
GPU_PIXEL_FORMATS = {
    "h264": ("yuv420p", "yuvj420p"),
    "hevc": ("yuv420p", "yuvj420p", "yuv420p10le"),
    "vp8": ("yuv420p",),
    "vp9": ("yuv420p",),
    "av1": ("yuv420p", "yuv420p10le"),
    "mpeg4": ("yuv420p",),
    "mjpeg": ("yuvj420p", "yuvj422p", "yuvj444p"),
}
"""Codecs of its mixed decoder (same place) with the pixel formats of every NVDEC that has the codec. NVIDIA's NVDEC application note, Video
Codec SDK 13.0, table of hardware capabilities: 10-bit and 4:2:2 H.264 only on Blackwell, VP9 profile 0."""
MOST_BATCH_BYTES = 2**30
"""Full-size frames of one run: DALI holds all frames of its samples before it resizes them. A single clip may exceed this."""

_INPUTS = {
    "content": (types.UINT8, 1),
    "start": (types.INT32, 0),
    "stride": (types.INT32, 0),
    "frames": (types.INT32, 0),
    "crop_at": (types.INT32, 1),
    "crop_size": (types.INT32, 1),
    "cover": (types.FLOAT, 1),
    "cut_at": (types.INT32, 1),
    "cut_size": (types.INT32, 1),
}
"""Arguments of a sample: (type, dimensions); pairs are (rows, columns)."""


@dataclass(frozen=True, kw_only=True)
class _Sample:
    request: DecodeRequest
    arguments: dict[str, NDArray[Any]]
    full_size_bytes: int


class DaliDecoder:
    """Decoder through DALI on one device. Threads may share it: they read files beside each other and take turns at the one pipeline.

    Args:
        device: where frames are decoded and stay.
        num_threads: DALI's threads.
        timeout_s: longest wait for a file's header or for the pipeline.
    """

    def __init__(self, *, device: torch.device, num_threads: int = 2, timeout_s: float = DECODE_TIMEOUT_S) -> None:
        self.on_gpu = device.type == "cuda"
        self.device_id = (device.index or 0) if self.on_gpu else None
        self.num_threads = num_threads
        self.timeout_s = timeout_s
        self._pipeline: Any = None
        self._turn = threading.Lock()

    @property
    def identity(self) -> str:
        """See `Decoder.identity`; the GPU's decoder gives other pixels than the CPU's."""
        return f"dali {nvidia.dali.__version__} {'gpu' if self.on_gpu else 'cpu'}"

    @property
    def batch_size(self) -> int:
        """One sample per thread."""
        return self.num_threads

    def decodes(self, facts: VideoFacts) -> bool:
        """Whether this device decodes such a file as it is to be shown: DALI neither turns pictures nor makes pixels square."""
        return facts.shown_as_stored and self._has_codec(facts)

    def _has_codec(self, facts: VideoFacts) -> bool:
        if self.device_id is None:
            return facts.codec in CPU_CODECS
        return gpu_decodes(facts, capability=torch.cuda.get_device_capability(self.device_id))

    def decode(self, request: DecodeRequest) -> Tensor:
        """See `Decoder.decode`; files that this device does not decode are refused."""
        return normalise(self.pixels(request))

    def pixels(self, request: DecodeRequest, *, facts: VideoFacts | None = None) -> Tensor:
        """See `Decoder.pixels`; facts of the file, when they are known already."""
        (result,) = self.pixels_many([request], facts=[facts])
        if isinstance(result, DecodeError):
            raise result
        return result

    def pixels_many(self, requests: Sequence[DecodeRequest], *, facts: Sequence[VideoFacts | None] | None = None) -> list[Decoded]:
        """See `BatchDecoder.pixels_many`; facts of the files, as far as they are known already."""
        loaded = [self._load(request, known) for request, known in zip(requests, facts or [None] * len(requests), strict=True)]
        results: list[Decoded] = [sample if isinstance(sample, DecodeError) else DecodeError("not run") for sample in loaded]
        batch: list[tuple[int, _Sample]] = []
        for place, sample in enumerate(loaded):
            if isinstance(sample, DecodeError):
                continue
            held_bytes = sum(other.full_size_bytes for _, other in batch)
            if len(batch) == self.batch_size or (batch and held_bytes + sample.full_size_bytes > MOST_BATCH_BYTES):
                self._run_into(results, batch)
                batch = []
            batch.append((place, sample))
        if batch:
            self._run_into(results, batch)
        return results

    def _load(self, request: DecodeRequest, facts: VideoFacts | None) -> _Sample | DecodeError:
        try:
            facts = facts or video_facts(request.path, timeout_s=self.timeout_s)
            if not facts.shown_as_stored:
                how = "turned" if facts.turned else f"with pixels {facts.pixel_aspect:.3g} times as wide as high"
                raise DecodeError(
                    f"{request.path}: it is to be shown {how}, which DALI does not do; "
                    "use --data.decoder pyav or mixed, or re-encode it with megasora data shots --clips"
                )
            if not self.decodes(facts):
                where = "this GPU" if self.on_gpu else f"the CPU, where it has {', '.join(CPU_CODECS)}"
                raise DecodeError(
                    f"{request.path}: DALI does not decode {facts.codec} {facts.pixel_format} on {where}; "
                    "use --data.decoder pyav, or mixed for DALI where it can"
                )
            return _sample(request, facts)
        except DecodeError as error:
            return error
        except OSError as error:
            return DecodeError(f"{request.path}: {error}")

    def _run_into(self, results: list[Decoded], batch: Sequence[tuple[int, _Sample]]) -> None:
        for (place, _), result in zip(batch, self._run([sample for _, sample in batch]), strict=True):
            results[place] = result

    def _run(self, samples: Sequence[_Sample]) -> list[Decoded]:
        """One pipeline run, or one per sample when a run of several fails."""
        if not self._turn.acquire(timeout=self.timeout_s):
            return [DecodeError(f"{sample.request.path}: DALI was busy for more than {self.timeout_s:g} s") for sample in samples]
        try:
            self._pipeline = self._pipeline or self._build()
            (output,) = self._pipeline.run(**{name: [sample.arguments[name] for sample in samples] for name in _INPUTS})
            videos = [_chosen(sample.request, torch.utils.dlpack.from_dlpack(output[place])) for place, sample in enumerate(samples)]
            if self.on_gpu:  # the copies are only queued, and the next run may write into DALI's buffers
                torch.cuda.current_stream(self.device_id).synchronize()
        except RuntimeError as error:
            self._pipeline = None
            if len(samples) == 1:
                return [DecodeError(f"{samples[0].request.path}: {str(error).strip().splitlines()[0]}")]
            videos = None
        finally:
            self._turn.release()
        if videos is None:
            return [result for sample in samples for result in self._run([sample])]
        return [_checked(sample.request, video) for sample, video in zip(samples, videos, strict=True)]

    def _build(self) -> Any:
        @pipeline_def(  # type: ignore[untyped-decorator]
            batch_size=self.batch_size, num_threads=self.num_threads, device_id=self.device_id, prefetch_queue_depth=1, exec_dynamic=False
        )
        def pipeline() -> Any:
            return graph(on_gpu=self.on_gpu)

        built = pipeline()
        built.build()
        return built


def graph(*, on_gpu: bool) -> Any:
    """The operators from a sample's arguments to its frames, uint8 [3, T, H, W]; called inside a pipeline.

    DALI compares names and types of arguments with its operators' schemas here, and needs no GPU for it.
    """
    given = {name: fn.external_source(name=name, dtype=kind, ndim=dims) for name, (kind, dims) in _INPUTS.items()}
    video = fn.decoders.video(
        given["content"],
        device="mixed" if on_gpu else "cpu",
        start_frame=given["start"],
        stride=given["stride"],
        sequence_length=given["frames"],
        pad_mode="none",
    )
    # a slice and not resize's region of interest, whose filter reads pixels outside the region: a cropped border would bleed in
    video = fn.slice(video, given["crop_at"], given["crop_size"], axes=(1, 2))
    video = fn.resize(video, size=given["cover"], interp_type=types.INTERP_CUBIC, antialias=True)
    video = fn.slice(video, given["cut_at"], given["cut_size"], axes=(1, 2))
    return fn.transpose(video, perm=[3, 0, 1, 2])


class MixedDecoder:
    """DALI for the files that it decodes on this device as they are to be shown, PyAV for all others.

    Args:
        dali: the first choice.
        pyav: the decoder of everything else.
    """

    def __init__(self, *, dali: DaliDecoder, pyav: PyAVDecoder) -> None:
        self.dali, self.pyav = dali, pyav

    @property
    def identity(self) -> str:
        """See `Decoder.identity`."""
        return f"mixed({self.dali.identity}, {self.pyav.identity})"

    @property
    def batch_size(self) -> int:
        """DALI's."""
        return self.dali.batch_size

    def decode(self, request: DecodeRequest) -> Tensor:
        """See `Decoder.decode`."""
        facts = self._facts(request)
        return normalise(self.dali.pixels(request, facts=facts)) if self.dali.decodes(facts) else self.pyav.decode(request)

    def pixels(self, request: DecodeRequest) -> Tensor:
        """See `Decoder.pixels`."""
        facts = self._facts(request)
        return self.dali.pixels(request, facts=facts) if self.dali.decodes(facts) else self.pyav.pixels(request)

    def pixels_many(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        """See `BatchDecoder.pixels_many`."""
        results: list[Decoded] = [DecodeError("not run")] * len(requests)
        for_dali: dict[int, VideoFacts] = {}
        for place, request in enumerate(requests):
            try:
                facts = self._facts(request)
                if self.dali.decodes(facts):
                    for_dali[place] = facts
                else:
                    results[place] = self.pyav.pixels(request)
            except DecodeError as error:
                results[place] = error
        by_dali = self.dali.pixels_many([requests[place] for place in for_dali], facts=list(for_dali.values()))
        for place, result in zip(for_dali, by_dali, strict=True):
            results[place] = result
        return results

    def _facts(self, request: DecodeRequest) -> VideoFacts:
        return video_facts(request.path, timeout_s=self.dali.timeout_s)


def gpu_decodes(facts: VideoFacts, *, capability: tuple[int, int]) -> bool:
    """Whether NVDEC of a device decodes such a file.

    Args:
        facts: of the file.
        capability: compute capability of the device. A100, H100 and H200 (8.0, 9.0) have no AV1 decoder; 8.6 to 8.9 and 10.0 on have one
            (NVDEC application note, as above).
    """
    if facts.codec == "av1" and not ((8, 6) <= capability < (9, 0) or capability >= (10, 0)):
        return False
    return facts.pixel_format in GPU_PIXEL_FORMATS.get(facts.codec, ())


def _sample(request: DecodeRequest, facts: VideoFacts) -> _Sample:
    """A file's bytes and the arguments that make its frames the request's."""
    check_crop(request, height=facts.height, width=facts.width)
    x, y, crop_width, crop_height = request.crop or (0, 0, facts.width, facts.height)
    size = request.height, request.width
    height, width = covering_size((crop_height, crop_width), size)
    arguments: dict[str, NDArray[Any]] = {
        "content": np.fromfile(request.path, dtype=np.uint8),
        "start": np.array(request.start, dtype=np.int32),
        "stride": np.array(1 if request.span is not None else request.stride, dtype=np.int32),
        "frames": np.array(_read_frames(request), dtype=np.int32),
        "crop_at": np.array((y, x), dtype=np.int32),
        "crop_size": np.array((crop_height, crop_width), dtype=np.int32),
        "cover": np.array((height, width), dtype=np.float32),
        "cut_at": np.array(((height - size[0]) // 2, (width - size[1]) // 2), dtype=np.int32),
        "cut_size": np.array(size, dtype=np.int32),
    }
    return _Sample(request=request, arguments=arguments, full_size_bytes=3 * facts.height * facts.width * _read_frames(request))


def _read_frames(request: DecodeRequest) -> int:
    """Frames that DALI gives: it takes one stride, so of frames spread over a span all are read and some are chosen. A list of frames,
    which it takes too, would make a short read fail the whole run."""
    return request.num_frames if request.span is None else request.span


def _chosen(request: DecodeRequest, video: Tensor) -> Tensor:
    """A copy of the request's frames out of those that were read; of a short read, as many as there are."""
    if request.span is None:
        return video.clone()
    places = request.frames - request.start
    return video[:, torch.from_numpy(places[places < video.shape[1]]).to(video.device)]


def _checked(request: DecodeRequest, video: Tensor) -> Decoded:
    try:
        check_count(request, num_frames=video.shape[1])
    except DecodeError as error:
        return error
    return video

"""The given frames of a clip: read from pictures and clips at its size, encoded on their own."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megasora.config.errors import UserError
from megasora.config.schema import EncodersConfig
from megasora.data.decoding.contract import DecodeError, DecodeRequest
from megasora.data.decoding.pyav import PyAVDecoder, frame_count, video_facts
from megasora.diffusion.conditions import GivenFrames, given_frames
from megasora.inference.requests import ClipRequest
from megasora.models.autoencoders.autoencoder import Autoencoder


def runs_of(request: ClipRequest, encoders: EncodersConfig) -> tuple[GivenFrames, ...]:
    """Which frames the request's kind gives.

    Raises:
        UserError: the clip is too short for the kind.
    """
    try:
        return given_frames(
            request.kind,
            num_frames=request.size.num_frames,
            temporal_compression=encoders.temporal_compression,
            causal=encoders.causal,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def check_sources(request: ClipRequest, encoders: EncodersConfig) -> None:
    """Refuse what cannot be read, before anything is loaded.

    Raises:
        UserError: a file is no picture or clip, or a given clip is too short.
    """
    runs = runs_of(request, encoders)
    try:
        for path in request.sources:
            video_facts(str(path))
        if request.video is not None:
            available, (run,) = frame_count(str(request.video)), runs
            if available < run.count:
                shorter = ", or use --kind without _easy (33 frames)" if request.kind.endswith("easy") else ""
                raise UserError(f"{request.video} has {available} frames and {request.kind} needs {run.count}; give a longer clip{shorter}")
    except DecodeError as error:
        raise UserError(f"{error}; give a picture or a clip") from error


def encode_given(
    request: ClipRequest, vae: Autoencoder, encoders: EncodersConfig, *, decoder: PyAVDecoder | None = None
) -> tuple[tuple[GivenFrames, Tensor], ...]:
    """Runs of given frames and their scaled latents (posterior means, on the CPU).

    Of a picture its one frame, of a clip given as a picture its first frame (at the clip's head) or its last (at its tail), of a given clip
    its first or last frames.

    Raises:
        UserError: a file cannot be decoded.
    """
    decoder = decoder or PyAVDecoder()
    made: list[tuple[GivenFrames, Tensor]] = []
    for run in runs_of(request, encoders):
        at_tail = run.start > 0
        path = request.video or (request.end_image if at_tail else request.image)
        assert path is not None  # requests_of and runs_of agree about what a kind needs
        try:
            start = frame_count(str(path)) - run.count if at_tail else 0
            pixels = decoder.decode(_request(path, request, start=max(0, start), count=run.count))
        except DecodeError as error:
            raise UserError(str(error)) from error
        made.append((run, vae.encode(pixels).float().cpu()))
    return tuple(made)


def _request(path: Path, request: ClipRequest, *, start: int, count: int) -> DecodeRequest:
    size = request.size
    return DecodeRequest(path=str(path), start=start, stride=1, num_frames=count, height=size.height, width=size.width)

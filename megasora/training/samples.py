"""Where training samples come from: clips decoded and encoded on the way, or a cache that `megasora data encode` wrote, or half of each.

Either way the feed gets the same thing, a `Material` per clip.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
from megasora.data.cache.identity import NULL_FILE, file_sha256
from megasora.data.cache.layout import caption_of
from megasora.data.cache.reading import Cache, CacheLoader, ReadStep, Stored
from megasora.data.cache.shards import BadSampleError, tensors_in
from megasora.data.decoding.contract import Decoded, DecodeError, Decoder, normalise
from megasora.data.loader import ClipLoader, LoadedStep
from megasora.data.plan import PlannedClip, Taken, request_of
from megasora.data.quarantine import Quarantine
from megasora.models.encoders.bundle import Encoders
from megasora.parallel.transfer import send
from megasora.training.material import DecodedClip, LatentMaterial, Material, StoredClip


@dataclass(frozen=True, kw_only=True)
class SourceStep:
    """This rank's clips of one step."""

    clips: tuple[Material | str, ...]
    """The material, or why there is none."""
    wait_s: float
    """Time the caller waited for decoders and files."""
    frames: int
    """Frames decoded for these clips."""
    decode_s: float
    """Time of the decoding threads, summed."""
    encode_s: float
    """Time spent on text and on bringing pixels to the device."""


class SampleSource:
    """Clips of coming steps, decoded or read ahead.

    Args:
        steps: this rank's samples of each coming step; where each begins matters where clips are decoded.
        clips: planned clips.
        config: the run.
        encoders: those that `encoders_needed` names.
        decoder: the run's decoder.
        cache: the opened cache of data.cache.
        device: where encoders run and samples are wanted.
        quarantine: clips that are not decoded.
    """

    def __init__(
        self,
        steps: Iterator[Sequence[Taken]],
        *,
        clips: Sequence[PlannedClip],
        config: RunConfig,
        encoders: Encoders,
        decoder: Decoder,
        cache: Cache | None,
        device: torch.device,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.clips, self.encoders, self.device = clips, encoders, device
        self._text_tokens = config.data.text_tokens
        self._has_latents = cache is not None and cache.facts.settings.has_latents
        self._has_text = cache is not None and cache.facts.settings.has_text
        self.scaling_factor = _scaling_factor(cache, config) if self._has_latents else encoders.vae.scaling_factor
        self.null = self._null(cache if self._has_text else None)
        """([L, text_dim], [vec_dim]) of the empty text."""
        data = config.data
        self._steps, for_decoder, for_cache = itertools.tee(steps, 3)
        self._decoded: ClipLoader | None = None
        if not self._has_latents:
            requests = ([request_of(clips[taken.sample], offset=taken.offset) for taken in step] for step in for_decoder)
            self._decoded = ClipLoader(
                requests,
                decoder=decoder,
                workers=data.decode_workers,
                ahead=data.prefetch_steps,
                timeout_s=data.decode_timeout_s,
                give="pixels",  # a quarter of the memory in the queue and on the way to the device
                quarantine=quarantine,
            )
        self._read: CacheLoader | None = None
        if cache is not None:
            place_of: NDArray[np.int64] = cache.places_of(clips)
            self._read = CacheLoader(
                cache,
                (place_of[[taken.sample for taken in step]].tolist() for step in for_cache),
                members=slice(0 if self._has_latents else 1, 2 if self._has_text else 1),
                workers=data.decode_workers,
                ahead=data.prefetch_steps,
                timeout_s=data.decode_timeout_s,
            )

    def __iter__(self) -> Iterator[SourceStep]:
        """Steps in order; material is encoded as it is taken, before the next step is asked for."""
        videos: Iterator[LoadedStep | None] = iter(self._decoded) if self._decoded is not None else itertools.repeat(None)
        stored: Iterator[ReadStep | None] = iter(self._read) if self._read is not None else itertools.repeat(None)
        for decoded, read in zip(videos, stored, strict=False):  # at most one of them never ends
            step = next(self._steps)
            nothing = itertools.repeat(None, len(step))
            pairs = zip(step, decoded.clips if decoded else nothing, read.samples if read else nothing, strict=True)
            started = time.perf_counter()
            clips = tuple(self._material(self.clips[taken.sample], video, tensors) for taken, video, tensors in pairs)
            yield SourceStep(
                clips=clips,
                wait_s=(decoded.wait_s if decoded else 0.0) + (read.wait_s if read else 0.0),
                frames=decoded.frames if decoded else 0,
                decode_s=decoded.decode_s if decoded else 0.0,
                encode_s=time.perf_counter() - started,
            )

    def close(self) -> None:
        """Stop working ahead."""
        for loader in (self._decoded, self._read):
            if loader is not None:
                loader.close()

    def _material(self, clip: PlannedClip, video: Decoded | None, stored: Stored | None) -> Material | str:
        for part in (video, stored):
            if isinstance(part, (DecodeError, BadSampleError)):
                return str(part)
        latents: LatentMaterial
        if self._has_latents:
            assert isinstance(stored, dict)
            latents = StoredClip(tensors=stored, device=self.device)
        else:
            assert isinstance(video, Tensor)
            (pixels,) = send([video], device=self.device)
            if pixels is video and video.is_cuda:  # decoded there by a thread, whose stream's memory it is
                video.record_stream(torch.cuda.current_stream(self.device))
            latents = DecodedClip(video=normalise(pixels), vae=self.encoders.vae)
        if self._has_text:
            assert isinstance(stored, dict)
            return Material(latents=latents, text=stored["t5"], vec=stored["clip"])
        text, vec = self.encoders.encode_text([caption_of(clip)], max_tokens=clip.text_tokens)
        return Material(latents=latents, text=text[0], vec=vec[0])

    def _null(self, cache: Cache | None) -> tuple[Tensor, Tensor]:
        if cache is None:
            text, vec = self.encoders.encode_text([""], max_tokens=self._text_tokens)
            return text[0], vec[0]
        path = cache.folder / NULL_FILE
        try:
            if file_sha256(path) != cache.facts.null_sha256:
                raise UserError(f"{path} is not as it was written; encode again into another folder")
            content = np.fromfile(path, np.uint8)
            tensors = tensors_in(content, 0, len(content))
        except (OSError, BadSampleError) as error:
            raise UserError(f"cannot read {path}: {error}; encode again into another folder") from error
        return tensors["t5"], tensors["clip"]


def _scaling_factor(cache: Cache | None, config: RunConfig) -> float:
    """Latents are stored without a factor, so that a run may have its own."""
    if config.encoders.scaling_factor is not None:
        return config.encoders.scaling_factor
    assert cache is not None and cache.facts.scaling_factor is not None, "a cache with latents records their scaling factor"
    return cache.facts.scaling_factor

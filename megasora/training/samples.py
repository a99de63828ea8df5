"""Where training samples come from: clips decoded and encoded on the way, or a cache that `megasora data encode` wrote, or half of each.

Either way the feed gets the same thing, a `Material` per clip: posteriors of the clip and of its given frames, and its text.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
from megasora.data.cache.identity import (
    NULL_FILE,
    CacheFacts,
    differences,
    encoder_differences,
    file_sha256,
    kinds_of,
    read_facts,
    settings_of,
    version_differences,
)
from megasora.data.cache.layout import caption_of, latent_names
from megasora.data.cache.reading import Cache, CacheLoader, ReadStep, Stored, open_cache
from megasora.data.cache.shards import BadSampleError, tensors_in
from megasora.data.decoding.contract import Decoded, DecodeError, Decoder, normalise
from megasora.data.loader import ClipLoader, LoadedStep
from megasora.data.plan import PlannedClip, request_of
from megasora.diffusion.conditions import GivenFrames
from megasora.models.encoders.bundle import PARTS, Encoders
from megasora.models.encoders.posterior import Posterior
from megasora.models.encoders.vae import HunyuanVAE

logger = logging.getLogger(__name__)


class LatentMaterial(Protocol):
    """Latents of one clip."""

    def latent(self, run: GivenFrames | None) -> Tensor | Posterior:
        """Of the clip, or of a run of its frames encoded on its own: the posterior, or the one sample a cache holds. Not scaled."""
        ...


@dataclass(frozen=True, kw_only=True)
class DecodedClip:
    """Pixels, encoded when asked."""

    video: Tensor
    vae: HunyuanVAE

    def latent(self, run: GivenFrames | None) -> Posterior:
        """See `LatentMaterial.latent`."""
        return self.vae.posterior(self.video if run is None else self.video[:, run.start : run.start + run.count])


@dataclass(frozen=True, kw_only=True)
class StoredClip:
    """Latents from a cache."""

    tensors: Mapping[str, Tensor]
    device: torch.device

    def latent(self, run: GivenFrames | None) -> Tensor | Posterior:
        """See `LatentMaterial.latent`."""
        place = None if run is None else (run.start, run.count)
        (sample,) = latent_names("sampled", place)
        if sample in self.tensors:
            return self.tensors[sample].to(self.device)
        mean, std = (self.tensors[name].to(self.device) for name in latent_names("mean_std", place))
        return Posterior(mean=mean, std=std)


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a training sample is made from."""

    latents: LatentMaterial
    text: Tensor
    """[L, text_dim]"""
    vec: Tensor
    """[vec_dim]"""


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
        steps: this rank's samples of each coming step, by number of planned clip.
        clips: planned clips.
        config: the run.
        encoders: those that `encoders_needed` names.
        decoder: the run's decoder.
        cache: the opened cache of data.cache.
        device: where encoders run and samples are wanted.
    """

    def __init__(
        self,
        steps: Iterator[Sequence[int]],
        *,
        clips: Sequence[PlannedClip],
        config: RunConfig,
        encoders: Encoders,
        decoder: Decoder,
        cache: Cache | None,
        device: torch.device,
    ) -> None:
        self.clips, self.encoders, self.device = clips, encoders, device
        self._text_tokens = config.data.text_tokens
        self._has_latents = cache is not None and cache.facts.settings.has_latents
        self._has_text = cache is not None and cache.facts.settings.has_text
        self.scaling_factor = _scaling_factor(cache) if self._has_latents else encoders.vae.scaling_factor
        self.null = self._null(cache if self._has_text else None)
        """([L, text_dim], [vec_dim]) of the empty text."""
        data = config.data
        self._steps, for_decoder, for_cache = itertools.tee(steps, 3)
        self._decoded: ClipLoader | None = None
        if not self._has_latents:
            requests = ([request_of(clips[sample]) for sample in step] for step in for_decoder)
            self._decoded = ClipLoader(
                requests,
                decoder=decoder,
                workers=data.decode_workers,
                ahead=data.prefetch_steps,
                timeout_s=data.decode_timeout_s,
                give="pixels",  # a quarter of the memory in the queue and on the way to the device
            )
        self._read: CacheLoader | None = None
        if cache is not None:
            place_of: NDArray[np.int64] = cache.places_of(clips)
            self._read = CacheLoader(
                cache,
                (place_of[list(step)].tolist() for step in for_cache),
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
            clips = tuple(self._material(self.clips[sample], video, tensors) for sample, video, tensors in pairs)
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
            latents = DecodedClip(video=normalise(video.to(self.device)), vae=self.encoders.vae)
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


def _scaling_factor(cache: Cache | None) -> float:
    assert cache is not None and cache.facts.scaling_factor is not None, "a cache with latents records their scaling factor"
    return cache.facts.scaling_factor


def encoders_needed(config: RunConfig) -> tuple[str, ...]:
    """Encoders that a training run loads: those whose output is not cached, and all of them when it measures or shows clips.

    Raises:
        UserError: data.cache is no cache.
    """
    evaluates = config.evaluation.interval_steps > 0 and config.data.eval_manifest is not None
    if config.data.cache is None or evaluates or config.evaluation.sample_interval_steps > 0:
        return PARTS
    settings = read_facts(Path(config.data.cache)).settings
    return (() if settings.has_latents else ("vae",)) + (() if settings.has_text else ("t5", "clip"))


def refuse_missing_encoders(config: RunConfig) -> None:
    """Refuse a run that needs an encoder whose folder is not given.

    Raises:
        UserError: says what needs it.
    """
    missing = [name for name in encoders_needed(config) if getattr(config.encoders, name) is None]
    if not missing:
        return
    flags = " ".join(f"--encoders.{name} FOLDER" for name in missing)
    if config.data.cache is None:
        raise UserError(f"no encoders given: add {flags}")
    held = {"both": "what training needs, evaluation needs more", "latents": "latents only", "text": "text only"}
    raise UserError(f"the cache {config.data.cache} holds {held[read_facts(Path(config.data.cache)).settings.store]}: add {flags}")


def open_training_cache(config: RunConfig) -> Cache | None:
    """The cache of data.cache, if any, after a check that it is what the run would encode; all ranks call it together.

    Raises:
        UserError: it lacks shards, or was made from other clips, settings or encoders; the same on every rank.
    """
    if config.data.cache is None:
        return None
    folder = Path(config.data.cache)
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:  # hashing weights once is enough
        try:
            facts = read_facts(folder)
            found = _differences(facts, config)
            if found:
                problem = [f"cache {folder} does not fit this run: {'; '.join(found)}; use the settings it was made with, or encode again"]
            for line in version_differences(facts):
                logger.warning("cache %s was made with another version: %s", folder, line)
        except UserError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UserError(problem[0])
    return open_cache(folder)


def _differences(facts: CacheFacts, config: RunConfig) -> list[str]:
    theirs = facts.settings
    ours = settings_of(
        config,
        store=theirs.store,
        latents=theirs.latents,
        kinds=kinds_of(config, every=False),
        samples_per_shard=theirs.samples_per_shard,
        samples=theirs.samples,
        manifest_sha256=file_sha256(str(config.data.manifest)),
    )
    found = differences(ours, theirs, leave_out=("conditions", "seed"))
    lacking = [kind for kind in ours.conditions if kind not in theirs.conditions]
    if theirs.has_latents and lacking:
        found.append(f"it lacks the frames of {', '.join(lacking)} (encode with those condition weights, or --conditions all)")
    if theirs.has_latents and theirs.latents == "sampled" and config.encoders.posterior == "mean":
        found.append("it holds one sample of each latent, encoders.posterior is mean (use --encoders.posterior sample)")
    return found + encoder_differences(facts, config.encoders)

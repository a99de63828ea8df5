"""Writes the shards of a planned cache: clips decoded ahead, encoded, checked against the planned layout, one shard after another."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megasora.config.errors import UserError
from megasora.data.cache.layout import caption_of, facts_json, latent_names, stored_runs
from megasora.data.cache.shards import MEMBERS, ShardFacts, ShardWriter, layout_of, safetensors_bytes
from megasora.data.decoding.contract import Decoded, DecodeError, Decoder, normalise
from megasora.data.loader import decoded_ahead
from megasora.data.plan import PlannedClip, request_of, start_of
from megasora.diffusion.conditions import GivenFrames
from megasora.diffusion.philox import Stream, key_of, uniform
from megasora.models.autoencoders.posterior import Posterior
from megasora.models.encoders.bundle import Encoders
from megasora.training.encode.clip_ranks import ClipRanks
from megasora.training.encode.plan import EncodePlan
from megasora.training.encode.settings import OnProgress


class ShardMaker:
    """Makes shards of a planned cache.

    Args:
        plan: what is stored.
        folder: of the cache.
        encoders: those that the plan needs.
        decoder: of the clips; None when only text is stored.
        ranks: that encode each clip together.
    """

    def __init__(self, plan: EncodePlan, folder: Path, *, encoders: Encoders, decoder: Decoder | None, ranks: ClipRanks) -> None:
        self.plan, self.folder, self.encoders, self.ranks = plan, folder, encoders, ranks
        self._decoder = decoder
        self.failed = self.bytes_written = 0

    def make(self, shards: Sequence[int], *, on_progress: OnProgress | None) -> None:
        """Write shards in order, on the first rank; clips of the next are decoded while one is written."""
        total = sum(len(self.plan.samples_of(shard)) for shard in shards)
        done = 0
        videos = self._videos(sample for shard in shards for sample in self.plan.samples_of(shard))
        try:
            for shard in shards:
                with ShardWriter(self.folder, shard) as writer:
                    for sample in self.plan.samples_of(shard):
                        self._write(writer, sample, next(videos))
                        done += 1
                        if on_progress is not None:
                            on_progress(done, total, self.bytes_written + writer.bytes_written)
                    facts = writer.finish()
                self._count(shard, facts)
        finally:
            videos.close()

    def follow(self, shards: Sequence[int]) -> None:
        """Take part in the autoencoder's work on every clip that the first rank writes."""
        for sample in (sample for shard in shards for sample in self.plan.samples_of(shard)):
            video = self.ranks.told(None)
            if isinstance(video, Tensor):
                self._latents(sample, self.plan.clips[sample], normalise(video))

    def _count(self, shard: int, facts: ShardFacts) -> None:
        self.failed += facts.failed
        self.bytes_written += facts.tar_bytes
        expected = self.plan.size.shard_bytes[shard]
        assert facts.failed or facts.tar_bytes == expected, f"shard {shard} has {facts.tar_bytes} bytes, {expected} were planned"

    def _videos(self, samples: Iterator[int]) -> Generator[Decoded | None, None, None]:
        """Decoded clips in order, ahead of their use; None when only text is stored."""
        if self._decoder is None:
            yield from (None for _ in samples)
            return
        data = self.plan.config.data
        yield from decoded_ahead(
            (request_of(self.plan.clips[sample], offset=self._offset(sample)) for sample in samples),
            decoder=self._decoder,
            workers=data.decode_workers,
            ahead=2 * data.decode_workers,
            timeout_s=data.decode_timeout_s,
        )

    def _write(self, writer: ShardWriter, sample: int, video: Decoded | None) -> None:
        clip = self.plan.clips[sample]
        video = self.ranks.told(video)
        if isinstance(video, DecodeError):
            writer.fail(sample, clip, str(video))
            return
        members: dict[str, bytes] = {}
        if video is not None:
            members[MEMBERS[0]] = self._checked(
                self._latents(sample, clip, normalise(video.to(self.encoders.vae.device))), self.plan.layout.latents_of(clip)
            )
        if self.plan.settings.has_text:
            text, vec = self.encoders.encode_text([caption_of(clip)], max_tokens=clip.text_tokens)
            members[MEMBERS[1]] = self._checked({"t5": text[0], "clip": vec[0]}, self.plan.layout.text_of(clip))
        members[MEMBERS[2]] = facts_json(clip, offset=self._offset(sample))
        writer.add(sample, clip, members)

    def _offset(self, sample: int) -> int:
        """First frame of a clip that is encoded."""
        settings = self.plan.settings
        if settings.temporal_start != "random" or settings.seed is None:
            return 0
        return start_of(self.plan.clips[sample], uniform=uniform(key=key_of(seed=settings.seed, stream=Stream.START, sample=sample)))

    def _checked(self, tensors: dict[str, Tensor], layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
        found = dict(layout_of(tensors))
        if found != dict(layout):
            raise UserError(f"the encoders gave {found}, the plan says {dict(layout)}; check --encoders.* and --model.*")
        return safetensors_bytes(tensors)

    def _latents(self, sample: int, clip: PlannedClip, video: Tensor) -> dict[str, Tensor]:
        """Latents of the clip and of its given frames, each encoded on its own."""
        settings = self.plan.settings
        runs = stored_runs(
            settings.conditions, num_frames=clip.num_frames, temporal_compression=settings.temporal_compression, causal=settings.causal
        )
        whole: list[GivenFrames | None] = [None, *runs]
        result: dict[str, Tensor] = {}
        elements = 0
        for run in whole:
            part = video if run is None else video[:, run.start : run.start + run.count]
            posterior = self.encoders.vae.posterior(part, group=self.ranks.group)
            names = latent_names(settings.latents, None if run is None else (run.start, run.count))
            result.update(zip(names, self._parts_of(posterior, sample, elements), strict=True))
            elements += posterior.mean.numel()
        return result

    def _parts_of(self, posterior: Posterior, sample: int, first_element: int) -> tuple[Tensor, ...]:
        seed = self.plan.settings.seed
        if seed is None or self.plan.settings.latents == "mean_std":
            return posterior.mean, posterior.std
        return (posterior.sample(key=key_of(seed=seed, stream=Stream.VAE, sample=sample), first_element=first_element),)

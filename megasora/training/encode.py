"""`megasora data encode`: every planned clip decoded and encoded once, exactly as training would, into shards that training reads.

The folder gets `cache.json` (what it was made from), `null.safetensors` (the empty text), `unplanned.jsonl` (rows that fit no shape) and
the shards. Shards are dealt out to tasks whole, so their bytes do not depend on how many tasks there were; finished ones are left alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
from megasora.config.validate import raise_on_problems, refuse_missing_autoencoder
from megasora.data.cache.identity import (
    FILE,
    FORMAT,
    NULL_FILE,
    PARTS,
    CacheFacts,
    CacheSettings,
    EncoderFacts,
    differences,
    encoder_facts,
    kinds_of,
    layout_of_run,
    library_versions,
    read_facts,
    save_facts,
    settings_of,
    version_differences,
)
from megasora.data.cache.layout import CacheLayout, CacheSize, cache_size, caption_of, facts_json, latent_names, readable_bytes, stored_runs
from megasora.data.cache.shards import (
    MEMBERS,
    BadShardError,
    ShardFacts,
    ShardWriter,
    layout_of,
    open_shard,
    remove_leftovers,
    safetensors_bytes,
    shard_name,
    write_whole,
)
from megasora.data.decoding.choice import open_decoder
from megasora.data.decoding.contract import Decoded, DecodeError, Decoder, normalise
from megasora.data.loader import ClipLoader
from megasora.data.manifest import SkippedRow, read_manifest
from megasora.data.plan import PlannedClip, plan_clips, request_of
from megasora.diffusion.conditions import GivenFrames
from megasora.diffusion.philox import Stream, key_of
from megasora.models.encoders.bundle import Encoders, load_encoders
from megasora.models.encoders.posterior import Posterior
from megasora.parallel import groups

logger = logging.getLogger(__name__)

UNPLANNED_FILE = "unplanned.jsonl"
OnProgress = Callable[[int, int, int], None]
"""Called with (clips done, clips in all, bytes written) of this task."""


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Latents and text of every planned clip, encoded once into WebDataset shards that `--data.cache` reads."""

    output: Path
    """Folder of the cache."""
    store: Literal["latents", "text", "both"] = "both"
    """What is stored; training encodes the rest on the way."""
    latents: Literal["mean_std", "sampled"] = "mean_std"
    """mean_std: the posterior, from which training takes the mean or draws (encoders.posterior); sampled: one sample drawn now, half as
    large, the same in every epoch."""
    conditions: Literal["recipe", "all"] = "recipe"
    """Condition frames that are stored, encoded on their own: for the kinds the run gives a weight above 0, or for all kinds."""
    shard: str | None = None
    """i/n: make the shards k with k % n = i. None takes SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, or 0/1 without them."""
    samples_per_shard: int = 512
    """Planned clips of a shard (512 of 256px and 129 frames with text are about 3.5 GB)."""
    verify: bool = False
    """Read finished shards and compare their SHA-256; damaged ones are made again."""


@dataclass(frozen=True, kw_only=True)
class EncodeResult:
    """What a task did."""

    output: str
    size: CacheSize
    """Of the whole cache."""
    made: tuple[int, ...]
    """Shards this task wrote."""
    kept: tuple[int, ...]
    """Shards of this task that were finished before."""
    missing: tuple[int, ...]
    """Shards of other tasks that are not finished yet."""
    samples: int
    """Planned clips in the shards this task wrote."""
    failed: int
    """Of them, clips that could not be encoded; the reasons are in the shards' failed.jsonl."""
    unplanned: int
    """Rows of the manifest that fit no shape; the reasons are in unplanned.jsonl."""
    bytes_written: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EncodePlan:
    """Everything that is known before a clip is opened."""

    config: RunConfig
    clips: tuple[PlannedClip, ...]
    unplanned: tuple[SkippedRow, ...]
    settings: CacheSettings
    layout: CacheLayout
    size: CacheSize

    def samples_of(self, shard: int) -> range:
        """Planned clips of a shard."""
        start = shard * self.settings.samples_per_shard
        return range(start, min(start + self.settings.samples_per_shard, len(self.clips)))


def plan_encode(config: RunConfig, settings: EncodeSettings) -> EncodePlan:
    """Plan a cache and count its bytes; reads the manifest only.

    Raises:
        UserError: the settings or the manifest do not allow it.
    """
    refuse_missing_autoencoder(config)
    raise_on_problems(config, world_size=config.parallel.model_parallel_size, check_memory=False)
    if settings.samples_per_shard < 1:
        raise UserError(f"--samples_per_shard {settings.samples_per_shard} must be positive")
    if config.data.manifest is None:
        raise UserError("no clips given: add --data.manifest TABLE (csv or parquet)")
    manifest = read_manifest(config.data.manifest)
    clips, unfit = plan_clips(manifest.clips, data=config.data, encoders=config.encoders, model=config.model)
    kinds = kinds_of(config, every=settings.conditions == "all")
    layout = layout_of_run(config, store=settings.store, latents=settings.latents, kinds=kinds)
    return EncodePlan(
        config=config,
        clips=clips,
        unplanned=tuple(sorted((*manifest.skipped, *unfit), key=lambda row: row.row)),
        settings=settings_of(
            config,
            store=settings.store,
            latents=settings.latents,
            kinds=kinds,
            samples_per_shard=settings.samples_per_shard,
            samples=len(clips),
            manifest_sha256=manifest.sha256,
        ),
        layout=layout,
        size=cache_size(clips, layout, samples_per_shard=settings.samples_per_shard),
    )


def task_of(shard: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """(i, n) of this task: shard k is made by task k % n.

    Args:
        shard: i/n, or None for the job array's.
        environment: where Slurm's variables are looked up (sbatch(1), JOB ARRAY SUPPORT).

    Raises:
        UserError: not two numbers with 0 <= i < n.
    """
    try:
        if shard is not None:
            task, tasks = map(int, shard.split("/"))
        else:
            first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{name}", default)) for name, default in (("MIN", "0"), ("STEP", "1")))
            task = (int(environment.get("SLURM_ARRAY_TASK_ID", str(first))) - first) // step
            tasks = int(environment.get("SLURM_ARRAY_TASK_COUNT", "1"))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--shard {shard!r} (or SLURM_ARRAY_TASK_*) is not i/n, such as 0/4") from None
    if not 0 <= task < tasks:
        raise UserError(f"--shard {task}/{tasks}: i counts from 0, so it must be below n; use 0/{tasks} to {tasks - 1}/{tasks}")
    return task, tasks


def run_encode(
    config: RunConfig,
    settings: EncodeSettings,
    *,
    on_progress: OnProgress | None = None,
    on_start: Callable[[CacheSize], None] | None = None,
) -> EncodeResult:
    """Encode this task's shards; finished ones are skipped.

    Args:
        config: the run that will train; tiny makes its own clips and encoders in the folder when none are given.
        settings: what is stored, and where.
        on_progress: told about every finished clip.
        on_start: told the size before anything is decoded.

    Raises:
        UserError: settings, files, disk or an earlier cache in the folder do not allow it.
    """
    started = time.monotonic()
    task, tasks = task_of(settings.shard, os.environ)
    folder = settings.output
    with _file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        plan = plan_encode(_with_tiny_assets(config, folder=folder / "assets"), settings)
        if on_start is not None:
            on_start(plan.size)
        own = range(task, plan.settings.num_shards, tasks)
        remove_leftovers(folder, own)
        maker = _Maker(plan, folder)
        maker.check_folder()
        todo = [shard for shard in own if not maker.is_finished(shard, verify=settings.verify)]
        if todo:
            _refuse_full_disk(folder, sum(plan.size.shard_bytes[shard] for shard in todo))
            maker.prepare()
            maker.make(todo, on_progress=on_progress)
        others = [shard for shard in range(plan.settings.num_shards) if shard % tasks != task]
        missing = tuple(shard for shard in others if not (folder / f"{shard_name(shard)}.json").exists())
    return EncodeResult(
        output=str(folder),
        size=plan.size,
        made=tuple(todo),
        kept=tuple(shard for shard in own if shard not in set(todo)),
        missing=missing,
        samples=sum(len(plan.samples_of(shard)) for shard in todo),
        failed=maker.failed,
        unplanned=len(plan.unplanned),
        bytes_written=maker.bytes_written,
        seconds=time.monotonic() - started,
    )


class _Maker:
    """Makes shards of a planned cache in a folder."""

    def __init__(self, plan: EncodePlan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.failed = self.bytes_written = 0
        self._facts = read_facts(folder) if (folder / FILE).exists() else None
        self._encoders: Encoders | None = None
        self._decoder: Decoder | None = None
        self._identities = self._encoder_identities()

    @property
    def encoders(self) -> Encoders:
        """Those that are needed, once `prepare` loaded them."""
        assert self._encoders is not None
        return self._encoders

    def _parts(self) -> tuple[str, ...]:
        settings = self.plan.settings
        return (("vae",) if settings.has_latents else ()) + (("t5", "clip") if settings.has_text else ())

    def _encoder_identities(self) -> dict[str, EncoderFacts | None]:
        encoders = self.plan.config.encoders
        missing = [name for name in self._parts() if getattr(encoders, name) is None]
        if missing:
            raise UserError(f"no encoders given: add {' '.join(f'--encoders.{name} FOLDER' for name in missing)}")
        return {
            name: encoder_facts(getattr(encoders, name), known=getattr(self._facts, name, None)) if name in self._parts() else None
            for name in PARTS
        }

    def check_folder(self) -> None:
        """Refuse a folder that holds a cache made otherwise."""
        facts = self._facts
        if facts is None:
            return
        found = differences(self.plan.settings, facts.settings)
        for name, identity in self._identities.items():
            known: EncoderFacts | None = getattr(facts, name)
            if identity is not None and known is not None and identity.sha256 != known.sha256:
                found.append(f"encoders.{name} has the hash {known.sha256[:12]} in the cache and {identity.sha256[:12]} in this run")
        if found:
            raise UserError(f"{self.folder} holds a cache made otherwise: {'; '.join(found)}; give those settings or another --output")

    def is_finished(self, shard: int, *, verify: bool) -> bool:
        """Whether a shard is there as it was written; without cache.json nobody knows what it holds."""
        try:
            open_shard(self.folder, shard, verify=verify)
        except BadShardError as error:
            if (self.folder / f"{shard_name(shard)}.json").exists():
                logger.warning("shard %d is made again: %s", shard, error)
            return False
        return self._facts is not None

    def prepare(self) -> None:
        """Load the encoders and write, or check against, what the cache says about itself."""
        config, settings = self.plan.config, self.plan.settings
        device = groups.choose_device(config.device)
        if settings.has_latents:
            data = config.data
            self._decoder = open_decoder(data.decoder, device=device, workers=data.decode_workers, timeout_s=data.decode_timeout_s)
        self._encoders = load_encoders(config.encoders, model=config.model, device=device, parts=self._parts())
        decoder = self._decoder.identity if self._decoder is not None else None
        if self._facts is not None:
            self._check_decoder(self._facts, decoder)
            return
        null: bytes | None = None
        if settings.has_text:
            text, vec = self.encoders.encode_text([""], max_tokens=settings.text_tokens)
            null = safetensors_bytes({"t5": text[0], "clip": vec[0]})
            write_whole(self.folder / NULL_FILE, null)
        lines = (json.dumps({"row": row.row, "reason": row.reason}) + "\n" for row in self.plan.unplanned)
        write_whole(self.folder / UNPLANNED_FILE, "".join(lines).encode())
        facts = CacheFacts(
            format=FORMAT,
            settings=settings,
            **self._identities,
            scaling_factor=self.encoders.vae.scaling_factor if settings.has_latents else None,
            decoder=decoder,
            versions=library_versions(),
            null_sha256=hashlib.sha256(null).hexdigest() if null is not None else None,
        )
        save_facts(self.folder, facts)

    def _check_decoder(self, facts: CacheFacts, decoder: str | None) -> None:
        """Another decoder gives other pixels and is refused; another version of anything warns."""
        if decoder is not None and facts.decoder is not None and decoder.split()[0] != facts.decoder.split()[0]:
            raise UserError(
                f"{self.folder} was decoded by {facts.decoder}, this run decodes by {decoder}; "
                f"use --data.decoder {facts.decoder.split()[0]} or another --output"
            )
        for line in version_differences(facts, decoder=decoder):
            logger.warning("cache %s was begun with another version: %s", self.folder, line)

    def make(self, shards: Sequence[int], *, on_progress: OnProgress | None) -> None:
        """Write shards in order; clips of the next are decoded while one is written."""
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
        loader = ClipLoader(
            ([request_of(self.plan.clips[sample])] for sample in samples),
            decoder=self._decoder,
            workers=data.decode_workers,
            ahead=2 * data.decode_workers,
            timeout_s=data.decode_timeout_s,
            give="pixels",
        )
        try:
            for step in loader:
                yield step.clips[0]
        finally:
            loader.close()

    def _write(self, writer: ShardWriter, sample: int, video: Decoded | None) -> None:
        clip = self.plan.clips[sample]
        if isinstance(video, DecodeError):
            writer.fail(sample, clip, str(video))
            return
        members: dict[str, bytes] = {}
        if video is not None:
            members[MEMBERS[0]] = self._checked(
                self._latents(sample, clip, normalise(video.to(self.encoders.vae.vae.device))), self.plan.layout.latents_of(clip)
            )
        if self.plan.settings.has_text:
            text, vec = self.encoders.encode_text([caption_of(clip)], max_tokens=clip.text_tokens)
            members[MEMBERS[1]] = self._checked({"t5": text[0], "clip": vec[0]}, self.plan.layout.text_of(clip))
        members[MEMBERS[2]] = facts_json(clip)
        writer.add(sample, clip, members)

    def _checked(self, tensors: dict[str, Tensor], layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
        found = dict(layout_of(tensors))
        if found != dict(layout):
            raise UserError(f"the encoders gave {found}, the plan says {dict(layout)}; check --encoders.* and --model.*")
        return safetensors_bytes(tensors)

    def _latents(self, sample: int, clip: PlannedClip, video: Tensor) -> dict[str, Tensor]:
        """Latents of the clip and of its given frames, each encoded on its own."""
        settings = self.plan.settings
        runs = stored_runs(settings.conditions, num_frames=clip.num_frames, temporal_compression=settings.temporal_compression)
        whole: list[GivenFrames | None] = [None, *runs]
        result: dict[str, Tensor] = {}
        elements = 0
        for run in whole:
            part = video if run is None else video[:, run.start : run.start + run.count]
            posterior = self.encoders.vae.posterior(part)
            names = latent_names(settings.latents, None if run is None else (run.start, run.count))
            result.update(zip(names, self._parts_of(posterior, sample, elements), strict=True))
            elements += posterior.mean.numel()
        return result

    def _parts_of(self, posterior: Posterior, sample: int, first_element: int) -> tuple[Tensor, ...]:
        seed = self.plan.settings.seed
        if seed is None:
            return posterior.mean, posterior.std
        return (posterior.sample(key=key_of(seed=seed, stream=Stream.VAE, sample=sample), first_element=first_element),)


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the shards to write need {readable_bytes(needed)}, {folder} has {readable_bytes(free)} free; give another --output"
        )


@contextmanager
def _file_errors(folder: Path) -> Iterator[None]:
    """What the operating system refuses, as one line; finished shards stay."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename or folder}: {error.strerror or error}"
        raise UserError(f"cannot write the cache ({what}); finished shards are kept, the same command goes on") from error


def _with_tiny_assets(config: RunConfig, *, folder: Path) -> RunConfig:
    """The config with the clips and encoders that `megasora train tiny` would make, where it leaves them open."""
    if config.recipe != "tiny":
        return config
    from megasora.data.tiny_clips import make_tiny_clips
    from megasora.models.encoders.tiny import make_tiny_encoders

    if config.data.manifest is None:
        train, evaluation = make_tiny_clips(folder / "clips")
        config = replace(config, data=replace(config.data, manifest=str(train), eval_manifest=str(evaluation)))
    if all(getattr(config.encoders, name) is None for name in PARTS):
        captions = [clip.text for clip in read_manifest(str(config.data.manifest)).clips]
        config = replace(
            config, encoders=make_tiny_encoders(folder / "encoders", captions=captions, model=config.model, base=config.encoders)
        )
    return config

"""The teacher's features of every planned clip of a run of `megasora train-ae`, into shards that the run reads (`data.cache.teacher`).

Shards are dealt out to tasks whole; a task is one process with one device. Finished shards are left alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megasora.config.array_task import task_of
from megasora.config.autoencoder_checks import autoencoder_problems
from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.distillation_checks import TINY_RECIPE
from megasora.config.errors import UserError
from megasora.data.cache.identity import FILE, differences, encoder_facts, library_versions, save_facts
from megasora.data.cache.layout import facts_json, readable_bytes
from megasora.data.cache.shards import (
    END_BYTES,
    MEMBERS,
    ShardWriter,
    remove_leftovers,
    safetensors_bytes,
    safetensors_size,
    shard_name,
    tar_bytes,
    write_whole,
)
from megasora.data.cache.teacher import (
    DTYPES,
    FORMAT,
    IMAGE,
    WHOLE,
    TeacherCacheFacts,
    TeacherCacheSettings,
    read_teacher_facts,
    teacher_settings,
)
from megasora.data.decoding.choice import open_decoder
from megasora.data.decoding.contract import Decoded, DecodeError, Decoder, normalise
from megasora.data.loader import decoded_ahead
from megasora.data.manifest import read_manifest
from megasora.data.plan import PlannedClip, request_of
from megasora.models.autoencoders.teacher import Grid, Teacher, make_tiny_teacher
from megasora.parallel import groups
from megasora.training.autoencoder.feed import plan_training_clips
from megasora.training.autoencoder.teaching import load_teacher
from megasora.training.encode.record import UNPLANNED_FILE, is_whole
from megasora.training.encode.run import disk_errors, refuse_full_disk
from megasora.training.encode.settings import OnProgress, ShardsResult, TeacherEncodeSettings

NEEDED = ("autoencoder", "distillation", "data", "precision")
"""Sections whose problems matter here; a run's others are its own."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is known before a clip is opened."""

    config: AutoencoderRunConfig
    clips: tuple[PlannedClip, ...]
    unplanned: tuple[Mapping[str, object], ...]
    settings: TeacherCacheSettings

    def samples_of(self, shard: int) -> range:
        """Planned clips of a shard."""
        start = shard * self.settings.samples_per_shard
        return range(start, min(start + self.settings.samples_per_shard, len(self.clips)))

    def shard_bytes(self, shard: int) -> int:
        """Of its tar when no clip fails."""
        clips = (self.clips[sample] for sample in self.samples_of(shard))
        return sum(tar_bytes([safetensors_size(self.settings.layout(clip)), len(facts_json(clip))]) for clip in clips) + END_BYTES


def encode_teacher(
    config: AutoencoderRunConfig,
    settings: TeacherEncodeSettings,
    *,
    on_progress: OnProgress | None = None,
    on_start: Callable[[str], None] | None = None,
) -> ShardsResult:
    """Store this task's shards; finished ones are skipped.

    Args:
        config: the run that will train; tiny_ae_distill makes its own clips and teacher in the folder when none are given.
        settings: where.
        on_progress: told about every finished clip.
        on_start: told the size, in one line, before anything is decoded.

    Raises:
        UserError: settings, files, disk or an earlier cache in the folder do not allow it.
    """
    started, folder = time.monotonic(), settings.output
    task, tasks = task_of(settings.shard, os.environ)
    device = groups.choose_device(config.device)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        config = _with_tiny_assets(config, folder=folder / "assets")
        _refuse(config, settings)
        teacher = load_teacher(config.distillation, device=device, dtype=DTYPES[config.precision.dtype])
        plan = _planned(config, settings, channels=teacher.channels)
        own = range(task, plan.settings.num_shards, tasks)
        data = config.data
        decoder = open_decoder(data.decoder, device=device, workers=data.decode_workers, timeout_s=data.decode_timeout_s)
        known = _begin(plan, folder, decoder=decoder.identity)
        remove_leftovers(folder, own)
        todo = [shard for shard in own if not (known and is_whole(folder, shard, verify=settings.verify))]
        sizes = [plan.shard_bytes(shard) for shard in todo]
        if on_start is not None:
            shards = f"{len(todo):,} of {plan.settings.num_shards:,} shards to make"
            on_start(f"{len(plan.clips):,} clips; {shards}, {readable_bytes(sum(sizes))}")
        refuse_full_disk(folder, sum(sizes))
        maker = _Maker(plan, folder, teacher=teacher, decoder=decoder)
        maker.make(todo, on_progress=on_progress)
    others = [shard for shard in range(plan.settings.num_shards) if shard % tasks != task]
    return ShardsResult(
        output=str(folder),
        made=tuple(todo),
        kept=tuple(shard for shard in own if shard not in set(todo)),
        missing=tuple(shard for shard in others if not (folder / f"{shard_name(shard)}.json").exists()),
        samples=sum(len(plan.samples_of(shard)) for shard in todo),
        failed=maker.failed,
        unplanned=len(plan.unplanned),
        bytes_written=maker.bytes_written,
        seconds=time.monotonic() - started,
    )


def _with_tiny_assets(config: AutoencoderRunConfig, *, folder: Path) -> AutoencoderRunConfig:
    """With the clips and the teacher that train-ae would make in this folder, where tiny_ae_distill leaves them open."""
    if config.recipe != TINY_RECIPE:
        return config
    from megasora.data.tiny_clips import make_tiny_clips

    if config.data.manifest is None:
        train, _ = make_tiny_clips(folder / "clips")
        config = replace(config, data=replace(config.data, manifest=str(train)))
    if config.distillation.teacher is None:
        config = replace(config, distillation=replace(config.distillation, teacher=str(make_tiny_teacher(folder / "teacher"))))
    return config


def _refuse(config: AutoencoderRunConfig, settings: TeacherEncodeSettings) -> None:
    """Refuse what the run that reads the cache would be refused for, as far as it matters here."""
    if not config.has_distillation:
        raise UserError(f"{config.recipe} has no teacher (distillation.weight 0); use dc_ae_distill, or --distillation.weight 0.1")
    if config.distillation.teacher is None:
        raise UserError("no teacher given: add --distillation.teacher FOLDER (transformers' Dinov2Model)")
    if settings.samples_per_shard < 1:
        raise UserError(f"--samples_per_shard {settings.samples_per_shard} must be positive")
    reads = replace(config, distillation=replace(config.distillation, cache=str(settings.output)))
    found = [problem for problem in autoencoder_problems(reads, world_size=1) if problem.field.split(".")[0] in NEEDED]
    if found:
        raise UserError("\n  ".join([str(found[0])] if len(found) == 1 else [f"{len(found)} problems", *map(str, found)]))
    if config.data.manifest is None:
        raise UserError("no clips given: add --data.manifest TABLE (csv or parquet)")


def _planned(config: AutoencoderRunConfig, settings: TeacherEncodeSettings, *, channels: int) -> _Plan:
    manifest = read_manifest(str(config.data.manifest))
    clips, unfit = plan_training_clips(manifest.clips, config)
    rows = sorted((*manifest.skipped, *unfit), key=lambda row: row.row)
    return _Plan(
        config=config,
        clips=clips,
        unplanned=tuple({"row": row.row, "reason": row.reason} for row in rows),
        settings=teacher_settings(
            config,
            channels=channels,
            teacher_sha256=encoder_facts(str(config.distillation.teacher)).sha256,
            samples=len(clips),
            samples_per_shard=settings.samples_per_shard,
            manifest_sha256=manifest.sha256,
        ),
    )


def _begin(plan: _Plan, folder: Path, *, decoder: str) -> bool:
    """Write what the cache says about itself, or compare; whether it was there.

    Raises:
        UserError: the folder holds a cache made otherwise.
    """
    if not (folder / FILE).exists():
        write_whole(folder / UNPLANNED_FILE, "".join(json.dumps(row) + "\n" for row in plan.unplanned).encode())
        save_facts(folder, TeacherCacheFacts(format=FORMAT, settings=plan.settings, decoder=decoder, versions=library_versions()))
        return False
    known = read_teacher_facts(folder)
    found = differences(plan.settings, known.settings)
    if known.decoder.split()[0] != decoder.split()[0]:
        found.append(f"the decoder is {known.decoder} in the cache and {decoder} in this run")
    if found:
        raise UserError(f"{folder} holds a cache made otherwise: {'; '.join(found)}; give those settings or another --output")
    return True


class _Maker:
    """Writes shards: clips decoded ahead, shown to the teacher, checked against the planned layout."""

    def __init__(self, plan: _Plan, folder: Path, *, teacher: Teacher, decoder: Decoder) -> None:
        self.plan, self.folder, self.teacher, self.decoder = plan, folder, teacher, decoder
        self.failed = self.bytes_written = 0

    def make(self, shards: Sequence[int], *, on_progress: OnProgress | None) -> None:
        """In order."""
        samples = [sample for shard in shards for sample in self.plan.samples_of(shard)]
        with closing(self._decoded(samples)) as videos:
            done = 0
            for shard in shards:
                with ShardWriter(self.folder, shard) as writer:
                    for sample in self.plan.samples_of(shard):
                        self._write(writer, sample, next(videos))
                        done += 1
                        if on_progress is not None:
                            on_progress(done, len(samples), self.bytes_written + writer.bytes_written)
                    facts = writer.finish()
                self.failed += facts.failed
                self.bytes_written += facts.tar_bytes
                assert facts.failed or facts.tar_bytes == self.plan.shard_bytes(shard), f"shard {shard} has another size than was planned"

    def _decoded(self, samples: Sequence[int]) -> Generator[Decoded, None, None]:
        data = self.plan.config.data
        return decoded_ahead(
            (request_of(self.plan.clips[sample]) for sample in samples),
            decoder=self.decoder,
            workers=data.decode_workers,
            ahead=2 * data.decode_workers,
            timeout_s=data.decode_timeout_s,
        )

    def _write(self, writer: ShardWriter, sample: int, video: Decoded) -> None:
        clip = self.plan.clips[sample]
        if isinstance(video, DecodeError):
            writer.fail(sample, clip, str(video))
            return
        weight = next(self.teacher.model.parameters())
        pixels = normalise(video.to(weight.device))
        tensors = {WHOLE: self._features(pixels)}
        layout = self.plan.settings.layout(clip)
        if IMAGE in layout:
            tensors[IMAGE] = self._features(pixels[:, :1])
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        assert found == dict(layout), f"the teacher gave {found}, the plan says {layout}"
        writer.add(sample, clip, {MEMBERS[0]: safetensors_bytes(tensors), MEMBERS[2]: facts_json(clip)})

    def _features(self, pixels: Tensor) -> Tensor:
        return self.teacher.features(pixels, Grid(*self.plan.settings.grid(*pixels.shape[-3:])))

"""What a cache will hold, which shards a task makes and how large they get; reads the manifest only."""

from __future__ import annotations

from dataclasses import dataclass

from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
from megasora.config.validate import raise_on_problems
from megasora.data.cache.identity import CacheSettings, kinds_of, layout_of_run, settings_of
from megasora.data.cache.layout import CacheLayout, CacheSize, cache_size
from megasora.data.manifest import SkippedRow, read_manifest
from megasora.data.plan import PlannedClip, plan_clips
from megasora.training.encode.settings import EncodeSettings


@dataclass(frozen=True, kw_only=True)
class EncodePlan:
    """Everything that is known before a clip is opened."""

    config: RunConfig
    clips: tuple[PlannedClip, ...]
    unplanned: tuple[SkippedRow, ...]
    settings: CacheSettings
    layout: CacheLayout
    size: CacheSize

    @property
    def encoders_needed(self) -> tuple[str, ...]:
        """Encoders whose output is stored, by their setting."""
        return (("vae",) if self.settings.has_latents else ()) + (("t5", "clip") if self.settings.has_text else ())

    def samples_of(self, shard: int) -> range:
        """Planned clips of a shard."""
        start = shard * self.settings.samples_per_shard
        return range(start, min(start + self.settings.samples_per_shard, len(self.clips)))


def plan_encode(config: RunConfig, settings: EncodeSettings) -> EncodePlan:
    """Plan a cache and count its bytes; reads the manifest only.

    Raises:
        UserError: the settings or the manifest do not allow it.
    """
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

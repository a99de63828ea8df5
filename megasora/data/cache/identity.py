"""What a cache was made from: settings, the manifest, the encoders' weights, versions; and how that differs from a run's.

It is `cache.json` of the cache's folder, which `null.safetensors` (the embedding of the empty text) stands beside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

from megasora.config.errors import UserError
from megasora.config.io import from_dict, to_dict
from megasora.config.schema import ConditionConfig, Dtype, EncodersConfig, RunConfig
from megasora.data.cache.layout import CacheLayout, Latents, Store, layout_for
from megasora.data.cache.shards import write_whole
from megasora.data.cascade import decisions

FILE, NULL_FILE = "cache.json", "null.safetensors"
FORMAT = "megasora-cache-2"
"""2: clips go through the autoencoder whole in time, captions name the frame rate as the published ones do, and identity knows tiles, the
rule of buckets and where clips start."""
Facts = TypeVar("Facts")
PARTS = ("vae", "t5", "clip")
"""Encoders, by their setting."""


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """One file of an encoder's folder."""

    name: str
    bytes: int
    mtime_ns: int
    """With the same name, size and time of change the file is taken to be the same and not hashed again."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """An encoder's weights, config and tokenizer."""

    sha256: str
    """Over names and hashes of the files."""
    files: tuple[FileFacts, ...]


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What decides what the cache holds; a run that goes on writing must agree in all of it."""

    store: Store
    latents: Latents
    conditions: tuple[str, ...]
    """Kinds whose frames are stored."""
    samples_per_shard: int
    samples: int
    """Planned clips."""
    seed: int | None
    """Of the one posterior sample, for latents=sampled, and of the one start, for temporal_start=random."""
    manifest_sha256: str
    resolution: str
    resolution_classes: tuple[str, ...]
    """Of data.resolution_mix."""
    buckets: Literal["nearest", "published"]
    bucket_decisions: tuple[str, ...]
    """What of data.bucket_mix decides which shapes there are; not how likely each is."""
    frame_counts: tuple[int, ...]
    target_fps: float
    temporal_start: Literal["first", "random"] | None
    """Where the encoded frames begin: the first, or one start of each clip drawn when it was encoded; None without latents."""
    text_tokens: int
    temporal_compression: int
    causal: bool
    spatial_compression: int
    tile_size: int
    """Of the autoencoder's tiles, in pixels; 0: pictures were not cut."""
    tile_overlap: float
    patch_size: int
    latent_channels: int
    text_dim: int
    vec_dim: int
    dtype: Dtype
    tile_frames: int = 0
    """Of the autoencoder's windows; 0: clips were not cut in time."""

    @property
    def num_shards(self) -> int:
        """Shards of the whole cache."""
        return -(-self.samples // self.samples_per_shard)

    @property
    def has_latents(self) -> bool:
        """Whether latents are stored."""
        return self.store != "text"

    @property
    def has_text(self) -> bool:
        """Whether text is stored."""
        return self.store != "latents"


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """What cache.json says."""

    format: str
    settings: CacheSettings
    vae: EncoderFacts | None
    t5: EncoderFacts | None
    clip: EncoderFacts | None
    scaling_factor: float | None
    """Latents are stored without it and multiplied by it when they are read; None without latents."""
    decoder: str | None
    """Identity of what decoded the clips; None without latents."""
    versions: tuple[tuple[str, str], ...]
    """Libraries that made it."""
    null_sha256: str | None
    """Of null.safetensors; None without text."""


def settings_of(
    config: RunConfig, *, store: Store, latents: Latents, kinds: Sequence[str], samples_per_shard: int, samples: int, manifest_sha256: str
) -> CacheSettings:
    """The settings of the cache that a run would write."""
    data, encoders, model = config.data, config.encoders, config.model
    with_latents = store != "text"
    return CacheSettings(
        store=store,
        latents=latents,
        conditions=tuple(kinds) if with_latents else (),
        samples_per_shard=samples_per_shard,
        samples=samples,
        seed=config.train.seed if with_latents and (latents == "sampled" or data.temporal_start == "random") else None,
        manifest_sha256=manifest_sha256,
        resolution=data.resolution,
        resolution_classes=resolution_classes(config),
        buckets=data.buckets,
        bucket_decisions=decisions(data.bucket_mix),
        frame_counts=data.frame_counts,
        target_fps=data.target_fps,
        temporal_start=data.temporal_start if with_latents else None,
        text_tokens=data.text_tokens,
        temporal_compression=encoders.temporal_compression,
        causal=encoders.causal,
        spatial_compression=encoders.spatial_compression,
        tile_size=encoders.tile_size,
        tile_overlap=encoders.tile_overlap,
        patch_size=model.patch_size,
        latent_channels=model.latent_channels,
        text_dim=model.text_dim,
        vec_dim=model.vec_dim,
        dtype=encoders.dtype,
        tile_frames=encoders.tile_frames,
    )


def resolution_classes(config: RunConfig) -> tuple[str, ...]:
    """Classes that data.resolution_mix can draw."""
    return tuple(sorted(name for name, weight in config.data.resolution_mix if weight > 0))


def layout_of_run(config: RunConfig, *, store: Store, latents: Latents, kinds: Sequence[str]) -> CacheLayout:
    """How the samples of a run's cache are stored."""
    return layout_for(
        store=store,
        latents=latents,
        kinds=kinds,
        model=config.model,
        temporal_compression=config.encoders.temporal_compression,
        causal=config.encoders.causal,
        spatial_compression=config.encoders.spatial_compression,
        dtype=config.encoders.dtype,
    )


def kinds_of(config: RunConfig, *, every: bool) -> tuple[str, ...]:
    """Conditions other than t2v that the run draws (or all there are), none for a model that takes no condition."""
    if not config.model.cond_embed:
        return ()
    names = (field.name for field in fields(ConditionConfig) if field.name != "t2v")
    return tuple(name for name in names if every or getattr(config.condition, name) > 0)


def library_versions() -> tuple[tuple[str, str], ...]:
    """Installed versions of what decides the numbers."""
    found: list[tuple[str, str]] = []
    for package in ("torch", "diffusers", "transformers", "sentencepiece", "av", "nvidia-dali-cuda130"):
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue  # DALI is optional
    return tuple(found)


def encoder_facts(folder: str, *, known: EncoderFacts | None = None) -> EncoderFacts:
    """Facts of an encoder's folder; files that look as in `known` are not hashed again.

    Raises:
        UserError: it cannot be read, or holds no weights.
    """
    try:
        paths = sorted(path for path in Path(folder).iterdir() if path.is_file() and _counts(path))
    except OSError as error:
        raise UserError(f"cannot read the encoder folder {folder}: {error.strerror}") from error
    if any(path.suffix == ".safetensors" for path in paths):
        paths = [path for path in paths if path.suffix != ".bin"]  # the loaders prefer safetensors
    if not any(path.suffix in (".safetensors", ".bin") for path in paths):
        raise UserError(f"the encoder folder {folder} holds no weights (.safetensors or .bin)")
    remembered = {(file.name, file.bytes, file.mtime_ns): file for file in (known.files if known is not None else ())}
    files: list[FileFacts] = []
    for path in paths:
        status = path.stat()
        facts = remembered.get((path.name, status.st_size, status.st_mtime_ns))
        files.append(facts or FileFacts(name=path.name, bytes=status.st_size, mtime_ns=status.st_mtime_ns, sha256=_sha256(path)))
    joined = "".join(f"{file.name} {file.sha256}\n" for file in files)
    return EncoderFacts(sha256=hashlib.sha256(joined.encode()).hexdigest(), files=tuple(files))


def _counts(path: Path) -> bool:
    """Whether a file decides numbers; the manifest of the conversion that made the folder does not."""
    decides = path.suffix in (".safetensors", ".bin", ".json", ".model") or path.name == "merges.txt"
    return decides and path.name != "manifest.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path: str | Path) -> str:
    """Hash of a manifest.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return _sha256(Path(path))
    except OSError as error:
        raise UserError(f"cannot read manifest {path}: {error.strerror}; check --data.manifest") from error


def save_facts(folder: Path, facts: Any) -> None:
    """Write cache.json, of a dataclass."""
    write_whole(folder / FILE, (json.dumps(to_dict(facts), indent=1, sort_keys=True) + "\n").encode())


def read_facts(folder: Path) -> CacheFacts:
    """Read cache.json.

    Raises:
        UserError: the folder is no cache that this version reads.
    """
    return read_facts_of(folder, CacheFacts, written_as=FORMAT)


def read_facts_of(folder: Path, kind: type[Facts], *, written_as: str) -> Facts:
    """Read cache.json of a cache of this kind and format.

    Raises:
        UserError: the folder is none that this version reads.
    """
    path = folder / FILE
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{folder} is no cache ({FILE}: {error.strerror}); make one with megasora data encode --output {folder}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({str(error)[:80]}); encode again into another folder") from error
    if not isinstance(data, dict) or data.get("format") != written_as:
        raise UserError(f"{path} is not of the format {written_as}; encode again into another folder")
    facts: Facts = from_dict(data, kind, path=str(path))
    return facts


def differences(ours: Any, theirs: Any, *, leave_out: Sequence[str] = ()) -> list[str]:
    """Settings in which a run (ours) and a cache (theirs) differ, one phrase each; both of one dataclass."""
    return [
        f"{field.name} is {_short(getattr(theirs, field.name))} in the cache and {_short(getattr(ours, field.name))} in this run"
        for field in fields(ours)
        if field.name not in leave_out and getattr(ours, field.name) != getattr(theirs, field.name)
    ]


def _short(value: object) -> str:
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:12]}..."


def encoder_differences(facts: CacheFacts, encoders: EncodersConfig) -> list[str]:
    """Encoders of the run's folders that are not those of the cache; parts without a folder or not in the cache are not compared."""
    found: list[str] = []
    for name in PARTS:
        known: EncoderFacts | None = getattr(facts, name)
        folder: str | None = getattr(encoders, name)
        if known is not None and folder is not None:
            now = encoder_facts(folder, known=known)
            if now.sha256 != known.sha256:
                found.append(f"encoders.{name} has the hash {known.sha256[:12]} in the cache and {now.sha256[:12]} in {folder}")
    return found


def version_differences(facts: CacheFacts, *, decoder: str | None = None) -> list[str]:
    """Versions that differ from those that made the cache; they only warn, for numbers rarely change between them."""
    now = dict(library_versions())
    found = [f"{name} {was} -> {now.get(name, 'none')}" for name, was in facts.versions if now.get(name) != was]
    if decoder is not None and facts.decoder is not None and decoder != facts.decoder:
        found.append(f"decoder {facts.decoder} -> {decoder}")
    return found

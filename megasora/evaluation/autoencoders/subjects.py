"""The autoencoders that are compared: opened by their headers first, so that what cannot work ends before weights are read, then loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo

from megasora.checkpoint.autoencoder import HUNYUAN_CLASS, TITLES, AutoencoderSource, open_autoencoder
from megasora.checkpoint.megatron_io import is_megatron_checkpoint
from megasora.checkpoint.source import Select
from megasora.checkpoint.tensors import as_torch
from megasora.config.errors import UserError
from megasora.config.io import to_dict
from megasora.config.latent_statistics import KEY as LATENTS
from megasora.evaluation.autoencoders.settings import TILE_OVERLAP, Cutting, Dtype, Shape
from megasora.models.autoencoders.autoencoder import Autoencoder, AutoencoderFacts, Network
from megasora.models.autoencoders.dc_ae.model import VideoDCAE
from megasora.models.autoencoders.dc_ae.network import DCAENetwork
from megasora.models.autoencoders.hunyuan import HunyuanNetwork
from megasora.models.autoencoders.tiling import Tiling

DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One autoencoder by its header."""

    name: str
    """For tables; unlike every other subject's."""
    source: AutoencoderSource
    dtype: Dtype
    cutting: Cutting

    @property
    def path(self) -> Path:
        """Where its weights are."""
        return self.source.path

    @cached_property
    def blank(self) -> Autoencoder:
        """On the meta device, without weights: its rules, and what it would take."""
        with torch.device("meta"):
            network = self._network()
        network.module.to(DTYPES[self.dtype])
        return Autoencoder(network, tiling=self._tiling)

    @property
    def facts(self) -> AutoencoderFacts:
        """Its rules."""
        return self.blank.facts

    @cached_property
    def sha256(self) -> str:
        """Of its weights, however they are stored: names, types, shapes and bytes."""
        hashed = hashlib.sha256()
        for name, key in sorted(self.source.names.items()):
            hashed.update(f"{name} {self.source.reader.infos[key]}\n".encode())
            hashed.update(self.source.reader.rows(key).reshape(-1).data)
            self.source.reader.release(key)
        return hashed.hexdigest()

    @property
    def sizes(self) -> dict[str, Any]:
        """What of its configuration decides its numbers: all but the scale and what was measured."""
        about = dict(self.source.facts) if self.source.sizes is None else to_dict(self.source.sizes)
        return {key: value for key, value in about.items() if key not in ("scaling_factor", LATENTS)}

    def load(self, device: torch.device) -> Autoencoder:
        """With its weights, frozen, on a device."""
        with torch.device("meta"):
            network = self._network()
        reader = self.source.reader
        tensors = {name: as_torch(reader.rows(key), reader.infos[key]).to(DTYPES[self.dtype]) for name, key in self.source.names.items()}
        network.module.load_state_dict(tensors, strict=True, assign=True)
        autoencoder = Autoencoder(network, tiling=self._tiling)
        autoencoder.to(device)
        return autoencoder

    @property
    def _tiling(self) -> Tiling | None:
        cutting = self.cutting
        return Tiling(size=cutting.size, frames=cutting.frames, overlap=TILE_OVERLAP) if cutting.size or cutting.frames else None

    def _network(self) -> Network:
        if self.source.sizes is not None:
            return DCAENetwork(VideoDCAE(self.source.sizes))
        about = self.source.facts or {"_class_name": HUNYUAN_CLASS}
        return HunyuanNetwork(AutoencoderKLHunyuanVideo.from_config(about))


def open_subjects(paths: Sequence[Path], *, select: Select, dtype: Dtype, cutting: Cutting) -> tuple[Subject, ...]:
    """Every autoencoder, with a name of its own.

    Args:
        paths: folders, files, and checkpoints of train-ae.
        select: which weights of the checkpoints.
        dtype: number format they work in.
        cutting: of all of them.

    Raises:
        UserError: one cannot be opened, lacks a tensor, is of pictures, or cannot cut so; or none is a checkpoint to select from.
    """
    chosen = select if any(is_megatron_checkpoint(path) for path in paths) else "model"
    if select != chosen:
        raise UserError(f"--select {select} is for checkpoints of megasora train-ae, and none of WEIGHTS is one; leave it out")
    subjects = []
    for path, name in zip(paths, _names(paths), strict=True):
        source = open_autoencoder(path, select=chosen if is_megatron_checkpoint(path) else "model")
        if source.kind == "dc-ae-images":
            raise UserError(f"{path} is a {TITLES[source.kind]}: make a video DC-AE of it with megasora convert {path} DST --to dc-ae")
        if wrong := source.problems():
            raise UserError(f"{path}: {len(wrong)} tensors do not fit a {TITLES[source.kind]}, the first: {wrong[0]}")
        title = f"{name} ({chosen})" if is_megatron_checkpoint(path) else name
        subject = Subject(name=title, source=replace(source, path=path), dtype=dtype, cutting=cutting)
        _refuse_cutting(subject)
        subjects.append(subject)
    return tuple(subjects)


def _names(paths: Sequence[Path]) -> list[str]:
    """Last parts of the paths, as many as it takes to tell them apart.

    Raises:
        UserError: a path is given twice.
    """
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        twice = next(path for place, path in enumerate(paths) if parts.index(parts[place]) < place)
        raise UserError(f"{twice} is given twice; leave one out")
    names = []
    for own in parts:
        length = next(length for length in range(1, len(own) + 1) if sum(own[-length:] == other[-length:] for other in parts) == 1)
        names.append("/".join(own[-length:]).removesuffix(".safetensors"))
    return names if len(set(names)) == len(names) else ["/".join(own[1:]) for own in parts]


def _refuse_cutting(subject: Subject) -> None:
    facts, cutting = subject.facts, subject.cutting
    for what, flag, length, unit in (
        ("pixels", "SIZE", cutting.size, facts.spatial_compression),
        ("frames", "FRAMES", cutting.frames, 1 if facts.causal else facts.temporal_compression),
    ):
        if length % unit or (length // unit * TILE_OVERLAP) % 1 and not (what == "frames" and facts.causal):
            whole = int(unit / TILE_OVERLAP)
            near = max(1, round(length / whole)) * whole
            raise UserError(f"--tiling: {length} {what} do not cut into whole latents of {subject.name} with an overlap of a quarter; "
                            f"use {flag} {near}")  # fmt: skip


def shapes_for(subjects: Sequence[Subject], shapes: Sequence[Shape]) -> dict[str, tuple[Shape, ...]]:
    """Shapes that each subject takes. Autoencoders with other rules for frames can so be asked for in one command (1,32,33).

    Raises:
        UserError: a shape that no subject takes, or a subject that takes none; says what it takes.
    """
    taken: dict[str, tuple[Shape, ...]] = {}
    refusals: dict[Shape, list[UserError]] = {shape: [] for shape in shapes}
    for subject in subjects:
        found = []
        for shape in shapes:
            try:
                subject.facts.refuse(shape.num_frames, shape.height, shape.width)
                found.append(shape)
            except UserError as error:
                refusals[shape].append(error)
        if not found:
            raise UserError(f"{subject.name}: {refusals[shapes[0]][-1]} (--frames, --sizes)")
        taken[subject.name] = tuple(found)
    for errors in refusals.values():
        if len(errors) == len(subjects):
            raise UserError(f"{errors[0]} (--frames, --sizes)")
    return taken

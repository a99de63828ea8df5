"""Weights of any kind, opened: what they are, their own tensors, and the canonical ones made of them when asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megasora.checkpoint import manifests
from megasora.checkpoint.formats.detect import detect_format, detect_model
from megasora.checkpoint.formats.mapping import CanonicalReader
from megasora.checkpoint.formats.rules import Format
from megasora.checkpoint.megatron_io import MegatronReader, is_megatron_checkpoint
from megasora.checkpoint.safetensors_io import SafetensorsReader
from megasora.checkpoint.tensors import TensorReader
from megasora.config.errors import UserError
from megasora.config.io import from_dict
from megasora.config.schema import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

Select = Literal["model", "master", "ema"]
Axes = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """An opened set of weights."""

    path: Path
    fmt: Format
    model: ModelConfig
    reader: TensorReader
    """Its own tensors."""
    canonical: CanonicalReader
    """The canonical tensors."""
    facts: dict[str, Any]
    """A checkpoint's manifest; empty for weight files."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical tensors it has."""
        return self.canonical.shapes

    def read(self, key: str) -> Tensor:
        """A canonical tensor by name."""
        return self.canonical.read(key)

    def fits(self, model: ModelConfig) -> list[str]:
        """Notes on what differs harmlessly from `model`.

        A model with cond_in may start from weights without (it stays zero), and one without from weights whose cond_in is all zero;
        distilled guidance is dropped when the model has none.

        Raises:
            UserError: the weights are of another model.
        """
        notes = []
        if model.cond_embed and not self.model.cond_embed:
            notes.append("cond_in starts at zero")
        if self.model.guidance_embed and not model.guidance_embed:
            notes.append("guidance_in is dropped")
        comparable = replace(self.model, cond_embed=model.cond_embed, guidance_embed=model.guidance_embed, patch_size=model.patch_size)
        lacks_guidance = model.guidance_embed and not self.model.guidance_embed
        extra_cond = self.model.cond_embed and not model.cond_embed and self._has_trained_cond()
        if self.model.cond_embed and not model.cond_embed and not extra_cond:
            notes.append("cond_in, all zero, is dropped")
        if comparable != model or lacks_guidance or extra_cond:
            different = [
                f"{name} {getattr(self.model, name)} (wanted {getattr(model, name)})"
                for name in model.__dataclass_fields__
                if getattr(self.model, name) != getattr(model, name)
            ]
            raise UserError(f"weights {self.path} are of another model: {', '.join(different)}; change --model.* or give other weights")
        return notes

    def _has_trained_cond(self) -> bool:
        return any(bool(self.read(key).any()) for key in self.shapes if key.startswith("cond_in."))


def open_source(
    path: Path, *, fmt: Format | Literal["auto"] = "auto", axes_dim: Axes | None = None, select: Select = "model"
) -> WeightSource:
    """Open weights; tensors are read when asked for.

    Args:
        path: a .safetensors file, a folder of them, a diffusers pipeline, or a distributed checkpoint.
        fmt: its format; auto looks at the tensors.
        axes_dim: rotary dims per axis; None takes what the file says, or K/8, 7K/16, 7K/16.
        select: which weights of a training checkpoint.

    Raises:
        UserError: no weights there, another format than said, or an incomplete set.
    """
    if is_megatron_checkpoint(path):
        if fmt not in ("auto", "megasora"):
            raise UserError(f"{path} is a distributed checkpoint, not {fmt}")
        return _open_checkpoint(path, select)
    if fmt == "megasora":
        raise UserError(f"{path} is no distributed checkpoint (no .metadata with metadata.json)")
    if select != "model":
        raise UserError(f"--select {select}: {path} is no training checkpoint, it holds one set of weights")
    folder = path / "transformer" if (path / "transformer" / "config.json").is_file() else path
    reader = SafetensorsReader(folder)
    shapes = {key: info.shape for key, info in reader.infos.items()}
    found = detect_format(shapes) if fmt == "auto" else fmt
    model = detect_model(shapes, found, axes_dim=axes_dim or _axes_of(folder))
    return WeightSource(
        path=path, fmt=found, model=model, reader=reader, canonical=CanonicalReader(reader, fmt=found, model=model), facts={}
    )


def _axes_of(folder: Path) -> Axes | None:
    """Rotary dims in a diffusers folder's config.json."""
    path = folder / "config.json"
    if not folder.is_dir() or not path.is_file():
        return None
    try:
        axes = json.loads(path.read_text(encoding="utf-8")).get("axes_dims_rope")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no diffusers configuration: {str(error)[:120]}") from error
    if axes is None:
        return None
    if not isinstance(axes, list) or len(axes) != 3 or not all(type(axis) is int and axis > 0 for axis in axes):
        raise UserError(f"{path}: axes_dims_rope {axes} must be three positive numbers")
    return (axes[0], axes[1], axes[2])


def _open_checkpoint(path: Path, select: Select) -> WeightSource:
    facts = manifests.read(path)
    try:
        state = facts["state"] if facts["format"] == manifests.TRAINING else facts
        model: ModelConfig = from_dict(state["model"], ModelConfig, path=str(path / manifests.NAME))
        dtype, ema_decay = (state["dtype"], float(state["ema_decay"])) if facts["format"] == manifests.TRAINING else (None, 0.0)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / manifests.NAME} does not describe a model: {error} is missing") from error
    if facts["format"] == manifests.WEIGHTS:
        if select != "model":
            raise UserError(f"--select {select}: {path} holds the model's weights only")
        part: str = "model"
    else:
        # an fp32 run's master weights are its parameters and are stored once
        part = "model" if select == "master" and dtype == "fp32" else select
        if select == "ema" and not ema_decay > 0:
            raise UserError(f"{path} holds no EMA; use --select model")
    reader = MegatronReader(path, prefix=f"{part}.")
    canonical = CanonicalReader(reader, fmt="megasora", model=model)
    return WeightSource(path=path, fmt="megasora", model=model, reader=reader, canonical=canonical, facts=facts)

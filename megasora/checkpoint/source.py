"""Weights of any kind as canonical tensors, read one at a time: safetensors of every format, or a training checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp

from megasora.checkpoint import store
from megasora.checkpoint.formats.canonical import canonical_shapes
from megasora.checkpoint.formats.detect import detect_format, detect_model
from megasora.checkpoint.formats.mapping import CanonicalReader
from megasora.checkpoint.formats.rules import Format
from megasora.checkpoint.safetensors_io import SafetensorsReader
from megasora.config.errors import UserError
from megasora.config.io import from_dict
from megasora.config.schema import ModelConfig

Select = Literal["model", "master", "ema"]


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """An opened set of weights."""

    path: Path
    fmt: str
    """flux, diffusers, opensora, opensora-fused or megasora."""
    model: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    """Canonical tensors it has."""
    read: Callable[[str], Tensor]
    """A canonical tensor by name."""

    def fits(self, model: ModelConfig) -> list[str]:
        """Notes on what differs harmlessly from `model`.

        A model with cond_in may start from weights without (it stays zero); distilled guidance is dropped when the model has none.

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
        extra_cond = self.model.cond_embed and not model.cond_embed
        if comparable != model or lacks_guidance or extra_cond:
            different = [
                f"{name} {getattr(self.model, name)} (wanted {getattr(model, name)})"
                for name in model.__dataclass_fields__
                if getattr(self.model, name) != getattr(model, name)
            ]
            raise UserError(f"weights {self.path} are of another model: {', '.join(different)}; change --model.* or give other weights")
        return notes


def is_training_checkpoint(path: Path) -> bool:
    """Whether a folder is one of `megasora train`'s checkpoints."""
    return (path / store.MANIFEST).is_file() and (path / "metadata.json").is_file()


def open_source(
    path: Path,
    *,
    fmt: Format | Literal["auto", "megasora"] = "auto",
    axes_dim: tuple[int, int, int] | None = None,
    select: Select = "model",
) -> WeightSource:
    """Open weights; tensors are read when asked for.

    Raises:
        UserError: no weights there, another format than said, or an incomplete set.
    """
    if is_training_checkpoint(path):
        if fmt not in ("auto", "megasora"):
            raise UserError(f"{path} is a megasora training checkpoint, not {fmt}")
        return _open_checkpoint(path, select)
    if fmt == "megasora":
        raise UserError(f"{path} is no megasora training checkpoint (no {store.MANIFEST} with metadata.json)")
    reader = SafetensorsReader(path)
    shapes = {key: reader.shape(key) for key in reader.keys()}
    found = detect_format(shapes) if fmt == "auto" else fmt
    model = detect_model(shapes, found, axes_dim=axes_dim)
    canonical = CanonicalReader(reader, fmt=found, model=model)
    return WeightSource(path=path, fmt=found, model=model, shapes=canonical.shapes, read=canonical.read)


def _open_checkpoint(path: Path, select: Select) -> WeightSource:
    state = store.read_manifest(path)["state"]
    model: ModelConfig = from_dict(state["model"], ModelConfig, path=str(path))
    shapes = canonical_shapes(model)
    # an fp32 run's master weights are its parameters and are stored once
    part = "model" if select == "master" and state["dtype"] == "fp32" else select
    if select == "ema" and not state["ema_decay"] > 0:
        raise UserError(f"{path} holds no EMA; use --select model")
    dtype = torch.bfloat16 if part == "model" and state["dtype"] == "bf16" else torch.float32

    def read(key: str) -> Tensor:
        tensors = {f"{part}.{key}": torch.empty(shapes[key], dtype=dtype)}
        dcp.load(tensors, checkpoint_id=str(path), no_dist=True)  # type: ignore[attr-defined]
        return tensors[f"{part}.{key}"]

    return WeightSource(path=path, fmt="megasora", model=model, shapes=shapes, read=read)

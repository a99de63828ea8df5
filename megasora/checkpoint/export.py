"""Writes weights in another system's format: one safetensors file, a manifest of hashes beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megasora import __version__
from megasora.checkpoint.formats.mapping import foreign_tensors
from megasora.checkpoint.formats.rules import Format
from megasora.checkpoint.safetensors_io import write_safetensors
from megasora.checkpoint.source import Select, WeightSource, open_source
from megasora.config.errors import UserError


def export_weights(
    source_path: Path,
    target: Path,
    *,
    source_format: Format | str = "auto",
    target_format: Format,
    drop_cond: bool = False,
    select: Select = "model",
) -> list[str]:
    """Convert weights; the target appears only when complete.

    Returns:
        Lines that say what was done, lossy steps included.

    Raises:
        UserError: the target exists or is no .safetensors file, or the model has what the target format cannot hold.
    """
    if target.suffix != ".safetensors":
        raise UserError(f"{target} must end in .safetensors (sharded folders are not written by this version)")
    if target.exists():
        raise UserError(f"{target} exists; remove it or choose another name")
    source = open_source(source_path, fmt=source_format, select=select)  # type: ignore[arg-type]
    notes = [f"{source.fmt} -> {target_format}: {source_path} -> {target}"]
    folded = _fold_condition(source, target_format, drop_cond=drop_cond, notes=notes)
    tensors = dict(foreign_tensors(folded.read, fmt=target_format, model=folded.model))
    write_safetensors(target, tensors, metadata={"format": "pt", "megasora": __version__})
    facts = {
        "megasora": __version__,
        "source": {"path": source_path.name, "format": source.fmt, "select": select},
        "format": target_format,
        "notes": notes[1:],
        "tensors": {name: {"shape": list(tensor.shape), "sha256": sha256_of(tensor)} for name, tensor in sorted(tensors.items())},
    }
    manifest = target.with_name(target.name + ".manifest.json")
    manifest.write_text(json.dumps(facts, indent=1) + "\n")
    return [*notes, f"{len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors.values()):,} parameters"]


def sha256_of(tensor: Tensor) -> str:
    """Hash of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _fold_condition(source: WeightSource, target_format: Format, *, drop_cond: bool, notes: list[str]) -> WeightSource:
    """FLUX and diffusers have no cond_in: with `drop_cond` its bias goes into img_in.bias and its weight is dropped."""
    if not source.model.cond_embed or target_format in ("opensora", "opensora-fused"):
        return source
    weight, bias = source.read("cond_in.weight"), source.read("cond_in.bias")
    if bool(weight.any()) or bool(bias.any()):
        if not drop_cond:
            raise UserError(
                f"{target_format} has no cond_in, and this model's is not zero; add --drop_cond to fold its bias and drop its weight"
            )
        notes.append("lossy: cond_in.weight is dropped, cond_in.bias is folded into img_in.bias")
    model = replace(source.model, cond_embed=False)
    shapes = {key: shape for key, shape in source.shapes.items() if not key.startswith("cond_in.")}

    def read(key: str) -> Tensor:
        tensor = source.read(key)
        return (tensor.float() + bias.float()).to(tensor.dtype) if key == "img_in.bias" else tensor

    return replace(source, model=model, shapes=shapes, read=read)

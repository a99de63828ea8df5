"""What a file or folder of weights is: format, variant, sizes, types, shards, and what a checkpoint holds. Nothing in it is executed."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megasora.checkpoint import manifests
from megasora.checkpoint.autoencoder import TITLES, kind_of, open_autoencoder
from megasora.checkpoint.export import open_adapter
from megasora.checkpoint.formats.lora import looks_like_adapter
from megasora.checkpoint.megatron_io import MegatronReader, is_megatron_checkpoint
from megasora.checkpoint.safetensors_io import SafetensorsReader
from megasora.checkpoint.source import WeightSource, open_source
from megasora.checkpoint.tensors import TensorInfo
from megasora.config.errors import UserError
from megasora.config.io import to_dict
from megasora.config.schema import ModelConfig

VARIANTS = {
    ModelConfig(): "Open-Sora v2",
    ModelConfig(in_channels=128, patch_size=1): "Open-Sora v2 with the video DC-AE",
    ModelConfig(cond_embed=False, guidance_embed=True): "FLUX.1-dev",
    ModelConfig(cond_embed=False): "FLUX.1-schnell",
}
"""Published sizes."""
_TEXT_ENCODERS = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"}
_MAGIC = (
    (b"GGUF", "a GGUF file (llama.cpp); convert it to safetensors first"),
    (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with git lfs pull"),
    (b"<!DOCTYPE", "a web page, probably a failed download"),
    (b"<html", "a web page, probably a failed download"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"\x80\x02", "a pickle (an old PyTorch file); it is not opened, loading it could run code. Save its tensors as safetensors"),
    (b"\x80\x04", "a pickle; it is not opened, loading it could run code. Save its tensors as safetensors"),
    (b"{", "JSON text"),
)


def describe(path: Path, *, tensors: bool = False) -> dict[str, Any]:
    """Facts about weights, ready for JSON.

    Args:
        path: file or folder.
        tensors: list every tensor too.

    Raises:
        UserError: not weights; says what it looks like.
    """
    if not path.exists():
        raise UserError(f"no weights at {path}")
    if is_megatron_checkpoint(path):
        return _checkpoint(path, tensors)
    encoder = _text_encoder(path)
    if encoder is not None:
        return encoder
    folder = path / "transformer" if (path / "transformer" / "config.json").is_file() else path
    _refuse_foreign(folder)
    reader = SafetensorsReader(folder)
    facts = _stored(path, reader.infos, [file.path for file in reader.files], tensors)
    if looks_like_adapter(reader.infos):
        adapter = open_adapter(path, model=None)
        ranks = sorted({pair.a.shape[0] for pair in adapter.modules.values()})
        return {
            **facts,
            "kind": "LoRA adapter",
            "format": adapter.naming,
            "modules": len(adapter.modules),
            "over": adapter.fmt,
            "ranks": ranks,
        }
    if kind_of(reader.infos) is not None:
        source = open_autoencoder(path, reader)
        return {**facts, "kind": TITLES[source.kind], "format": source.format, "problems": source.problems()}
    return {**facts, "kind": "MMDiT weights", **_model(open_source(path))}


def _stored(path: Path, infos: Mapping[str, TensorInfo], files: list[Path], tensors: bool) -> dict[str, Any]:
    types: Counter[str] = Counter()
    for info in infos.values():
        types[info.dtype] += info.numel
    facts: dict[str, Any] = {
        "path": str(path),
        "tensors": len(infos),
        "parameters": sum(info.numel for info in infos.values()),
        "bytes": sum(info.num_bytes for info in infos.values()),
        "dtypes": dict(types),
        "files": [{"name": file.name, "bytes": file.stat().st_size} for file in files],
    }
    if tensors:
        facts["tensor_list"] = {key: {"dtype": info.dtype, "shape": list(info.shape)} for key, info in infos.items()}
    return facts


def _model(source: WeightSource) -> dict[str, Any]:
    return {"format": source.fmt, "variant": VARIANTS.get(source.model, "another size"), "model": to_dict(source.model)}


def _checkpoint(path: Path, tensors: bool) -> dict[str, Any]:
    if not (path / manifests.NAME).is_file():
        keys = MegatronReader(path, prefix="").infos
        raise UserError(
            f"{path} looks like a Megatron distributed checkpoint of another project: no {manifests.NAME}, {len(keys)} tensors, "
            f"the first {', '.join(sorted(keys)[:3])}"
        )
    facts = manifests.read(path)
    source = open_source(path)
    held = MegatronReader(path, prefix="")
    stored = _stored(path, source.reader.infos, sorted(file for file in path.iterdir() if file.suffix == ".distcp"), tensors)
    state = facts.get("state", {})
    training = {
        "step": facts.get("step"),
        "recipe": state.get("recipe"),
        "samples_seen": state.get("samples_seen"),
        "layout": state.get("parallel"),
        "ema": "ema" in held.prefixes,
        "optimizer": "exp_avg" in held.prefixes,
        "bytes_of_everything": sum(info.num_bytes for info in held.infos.values()),
    }
    kind = "training checkpoint" if facts["format"] == manifests.TRAINING else "distributed weights"
    return {**stored, "kind": kind, **_model(source), "checkpoint": training if facts["format"] == manifests.TRAINING else None}


def _text_encoder(path: Path) -> dict[str, Any] | None:
    """A transformers folder of T5 or CLIP, checked against its class; None when it is none."""
    file = path / "config.json"
    if not path.is_dir() or not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = _TEXT_ENCODERS.get(str(config.get("model_type"))) if isinstance(config, dict) else None
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    if kind is None:
        return None
    import torch
    import transformers

    reader = SafetensorsReader(path)
    sizes = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True)
    with torch.device("meta"):
        model = getattr(transformers, kind)(sizes.get_text_config() if kind == "CLIPTextModel" else sizes)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    tied = {"encoder.embed_tokens.weight", "shared.weight"} if kind == "T5EncoderModel" else set()
    buffers = {key for key in expected if key.endswith("position_ids")}
    found = {key: info.shape for key, info in reader.infos.items()}
    missing = [key for key in expected if key not in found and key not in buffers and not (key in tied and tied & found.keys())]
    wrong = [key for key, shape in expected.items() if key in found and found[key] != shape]
    problems = [f"{key} is missing" for key in missing] + [f"{key} has shape {list(found[key])}" for key in wrong]
    facts = _stored(path, reader.infos, [file.path for file in reader.files], tensors=False)
    return {
        **facts,
        "kind": f"text encoder ({kind})",
        "format": "transformers",
        "unused": len(found.keys() - expected.keys()),
        "problems": problems,
    }


def _refuse_foreign(path: Path) -> None:
    """Say what a file that is no safetensors file looks like.

    Raises:
        UserError: it looks like something else.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(32)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("data.pkl") for name in names):
            raise UserError(
                f"{path} looks like a PyTorch file (a zip with a pickle); it is not opened, loading it could run code. "
                "Save its tensors as safetensors"
            )
        raise UserError(f"{path} looks like a zip archive of {len(names)} files, the first {names[0] if names else 'none'}")
    for magic, what in _MAGIC:
        if start.startswith(magic):
            raise UserError(f"{path} looks like {what}")


def render(facts: Mapping[str, Any]) -> None:
    """Print the facts as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(facts["path"]), show_header=False)
    for name in ("kind", "format", "variant", "modules", "over", "ranks"):
        if name in facts:
            table.add_row(name, str(facts[name]))
    table.add_row("parameters", f"{facts['parameters']:,} in {facts['tensors']:,} tensors, {facts['bytes'] / 1e9:.3f} GB")
    table.add_row("types", ", ".join(f"{dtype} {count:,}" for dtype, count in facts["dtypes"].items()))
    table.add_row("files", "\n".join(f"{file['name']} {file['bytes']:,} bytes" for file in facts["files"]))
    for section in ("model", "checkpoint"):
        for name, value in (facts.get(section) or {}).items():
            table.add_row(name, ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value))
    for problem in facts.get("problems", [])[:10]:
        table.add_row("problem", problem)
    console = Console()
    console.print(table)
    if "tensor_list" in facts:
        listing = Table("tensor", "type", "shape")
        for key, info in facts["tensor_list"].items():
            listing.add_row(key, info["dtype"], str(info["shape"]))
        console.print(listing)

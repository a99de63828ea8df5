"""The HunyuanVideo autoencoder's weights: the published file <-> diffusers' folder, checked against diffusers' class.

Both use the same tensor names (diffusers scripts/convert_hunyuan_video_to_diffusers.py renames nothing in the autoencoder); some published
files put `vae.` before every name. Hunyuan's own .pt is a pickle and is refused; Open-Sora v2 publishes the same tensors as safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megasora.checkpoint.export import Conversion
from megasora.checkpoint.outputs import write_json
from megasora.checkpoint.safetensors_io import SafetensorsReader, SafetensorsWriter, stored_order
from megasora.checkpoint.tensors import TensorInfo
from megasora.config.errors import UserError
from megasora.config.files import refuse_existing, written_whole

PREFIX = "vae."


def looks_like_autoencoder(keys: Mapping[str, object]) -> bool:
    """Whether the tensors are a HunyuanVideo autoencoder's."""
    return any(f"{prefix}encoder.conv_in.conv.weight" in keys and f"{prefix}post_quant_conv.weight" in keys for prefix in ("", PREFIX))


def configuration_of(path: Path) -> dict[str, Any]:
    """The diffusers configuration beside the weights; empty (the published sizes) for a bare file.

    Raises:
        UserError: it is no HunyuanVideo autoencoder's.
    """
    file = path / "config.json"
    if not path.is_dir() or not file.is_file():
        return {}
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        name = config.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is no diffusers configuration: {error}") from error
    if name != "AutoencoderKLHunyuanVideo":
        raise UserError(f"{file} is for {name}, not AutoencoderKLHunyuanVideo")
    return config


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the class, built without memory."""
    import torch
    from diffusers import AutoencoderKLHunyuanVideo

    with torch.device("meta"):
        model = AutoencoderKLHunyuanVideo.from_config(dict(config) or {"_class_name": "AutoencoderKLHunyuanVideo"})
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def differences(infos: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is missing, unknown or of another shape, in words."""
    found = [f"{key} is missing" for key in expected if key not in infos]
    found += [f"{key} is unknown" for key in infos if key not in expected]
    return found + [
        f"{key} has shape {list(infos[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in infos and infos[key].shape != shape
    ]


def export_autoencoder(source: Path, target: Path, *, target_format: Literal["hunyuan-vae", "diffusers-vae"] | str) -> Conversion:
    """Write the autoencoder as one file (hunyuan-vae) or as diffusers' folder (diffusers-vae); bits do not change.

    Raises:
        UserError: the source is no complete HunyuanVideo autoencoder, or the target exists or has the wrong ending.
    """
    refuse_existing(target, cure="remove it or choose another name")
    single = target_format == "hunyuan-vae"
    if (target.suffix == ".safetensors") != single:
        raise UserError(f"{target}: {target_format} is {'one file; end it in' if single else 'a folder; leave out'} .safetensors")
    reader = SafetensorsReader(source)
    if not looks_like_autoencoder(reader.infos):
        raise UserError(f"{source} is no HunyuanVideo autoencoder: encoder.conv_in.conv or post_quant_conv is missing")
    names = {key.removeprefix(PREFIX): key for key in reader.infos}
    infos = {name: reader.infos[key] for name, key in names.items()}
    config = configuration_of(source)
    wrong = differences(infos, expected_shapes(config))
    if wrong:
        raise UserError(f"{source}: {len(wrong)} tensors do not fit AutoencoderKLHunyuanVideo, the first: {wrong[0]}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(target) as whole:
        if not single:
            whole.mkdir()
            write_json(whole / "config.json", {"_class_name": "AutoencoderKLHunyuanVideo", **config})
        file = whole if single else whole / "diffusion_pytorch_model.safetensors"
        writer = SafetensorsWriter(file, {key: infos[key] for key in stored_order(infos)}, metadata={"format": "pt"})
        for name, key in names.items():
            writer.write(name, reader.rows(key))
            reader.release(key)
        writer.close()
    lines = (
        f"autoencoder -> {target_format}: {source} -> {target}",
        f"{len(infos)} tensors, {sum(i.numel for i in infos.values()):,} parameters",
    )
    return Conversion(lines=lines, manifest={}, proof=None)

"""Weights of an autoencoder, opened: which one it is, its sizes, and what is wrong with its tensors.

HunyuanVideo's has the same tensor names in its published file and in diffusers' folder (diffusers'
scripts/convert_hunyuan_video_to_diffusers.py renames nothing in it); some published files put `vae.` before every name. Hunyuan's own .pt
is a pickle and is refused; Open-Sora v2 publishes the same tensors as safetensors. The video DC-AE is one published file
(F32T4C128_AE.safetensors) or our folder; its network of pictures is diffusers' AutoencoderDC.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megasora.checkpoint.autoencoder_checkpoint import open_parameters
from megasora.checkpoint.formats import dc_ae
from megasora.checkpoint.megatron_io import is_megatron_checkpoint
from megasora.checkpoint.safetensors_io import SafetensorsReader
from megasora.checkpoint.source import Select
from megasora.checkpoint.tensors import TensorInfo, TensorReader
from megasora.config.dc_ae import CLASS_NAME, DCAEConfig, parse_config, read_config
from megasora.config.errors import UserError

PREFIX = "vae."
HUNYUAN_CLASS = "AutoencoderKLHunyuanVideo"
Kind = Literal["hunyuan", "dc-ae", "dc-ae-images"]
Shapes = Mapping[str, tuple[int, ...]]
TITLES: Mapping[Kind, str] = {
    "hunyuan": "HunyuanVideo autoencoder",
    "dc-ae": "video DC-AE",
    "dc-ae-images": "DC-AE of pictures (AutoencoderDC)",
}


@dataclass(frozen=True, kw_only=True)
class AutoencoderSource:
    """An opened autoencoder."""

    path: Path
    kind: Kind
    reader: TensorReader
    names: dict[str, str]
    """Plain tensor names -> the names they are stored under."""
    facts: dict[str, Any]
    """Its config.json; empty (the published sizes) for a bare file of HunyuanVideo's."""
    sizes: DCAEConfig | None
    """Of a DC-AE, also of one of pictures."""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor by its plain name."""
        return {name: self.reader.infos[key] for name, key in self.names.items()}

    @property
    def format(self) -> str:
        """Its name for `convert`."""
        folder = self.path.is_dir()
        return {
            "hunyuan": "diffusers-vae" if folder else "hunyuan-vae",
            "dc-ae": "dc-ae" if folder else "hcae",
            "dc-ae-images": "diffusers-dc-ae",
        }[self.kind]

    def problems(self) -> list[str]:
        """What is missing, unknown or of another shape, in words."""
        return differences(self.infos, self._expected())

    def _expected(self) -> Shapes:
        if self.kind == "hunyuan":
            return hunyuan_shapes(self.facts)
        assert self.sizes is not None
        return dc_ae.tensor_shapes(self.sizes) if self.kind == "dc-ae" else dc_ae.image_tensors(self.sizes)[0]


def kind_of(keys: Mapping[str, object]) -> Kind | None:
    """Which autoencoder has these tensors; None for none that is known."""
    if any(f"{prefix}encoder.conv_in.conv.weight" in keys and f"{prefix}post_quant_conv.weight" in keys for prefix in ("", PREFIX)):
        return "hunyuan"
    if "encoder.project_in.conv.weight" in keys:
        return "dc-ae"
    if "encoder.down_blocks.0.0.conv1.weight" in keys and "decoder.norm_out.weight" in keys:
        return "dc-ae-images"
    return None


def open_autoencoder(path: Path, reader: SafetensorsReader | None = None, *, select: Select = "model") -> AutoencoderSource:
    """Open a file, a folder, or a checkpoint of `megasora train-ae`.

    Args:
        path: where it is.
        reader: of a file or folder that is open already.
        select: which weights of a checkpoint.

    Raises:
        UserError: it is no autoencoder's, its config.json is another's, or there is nothing to select.
    """
    if is_megatron_checkpoint(path):
        return _open_checkpoint(path, select)
    if select != "model":
        raise UserError(f"--select {select}: {path} is no checkpoint of megasora train-ae, it holds one set of weights")
    reader = reader or SafetensorsReader(path)
    kind = kind_of(reader.infos)
    if kind is None:
        raise UserError(f"{path} is no autoencoder that is known ({', '.join(TITLES.values())}): its tensors have other names")
    facts, sizes = _facts_of(path), None
    if kind == "hunyuan":
        if facts and facts.get("_class_name") != HUNYUAN_CLASS:
            raise UserError(f"{path / 'config.json'} is for {facts.get('_class_name')}, not {HUNYUAN_CLASS}")
    elif kind == "dc-ae":
        sizes = read_config(path) if facts else dc_ae.config_of_shapes({key: info.shape for key, info in reader.infos.items()})
    else:
        if facts.get("_class_name") != dc_ae.IMAGE_CLASS:
            raise UserError(f"{path} needs the config.json of its {dc_ae.IMAGE_CLASS}; give the diffusers folder")
        sizes = dc_ae.clip_config(facts, where=str(path / "config.json"))
    prefix = PREFIX if kind == "hunyuan" else ""
    names = {key.removeprefix(prefix): key for key in reader.infos}
    return AutoencoderSource(path=path, kind=kind, reader=reader, names=names, facts=facts, sizes=sizes)


def _open_checkpoint(path: Path, select: Select) -> AutoencoderSource:
    state, reader = open_parameters(path, select=select)
    about: dict[str, Any] = state["model"]
    kind: Kind = "hunyuan" if about.get("_class_name") == HUNYUAN_CLASS else "dc-ae"
    sizes = parse_config(about, where=str(path)) if kind == "dc-ae" else None
    return AutoencoderSource(path=path, kind=kind, reader=reader, names={name: name for name in reader.infos}, facts=about, sizes=sizes)


def _facts_of(path: Path) -> dict[str, Any]:
    """config.json beside the weights; empty for a bare file."""
    file = path / "config.json"
    if not path.is_dir() or not file.is_file():
        return {}
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        config.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is no configuration ({CLASS_NAME} or diffusers'): {error}") from error
    return config


def hunyuan_shapes(config: Mapping[str, Any]) -> Shapes:
    """Name and shape of every tensor of diffusers' class, built without memory."""
    import torch
    from diffusers import AutoencoderKLHunyuanVideo

    with torch.device("meta"):
        model = AutoencoderKLHunyuanVideo.from_config(dict(config) or {"_class_name": HUNYUAN_CLASS})
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def differences(infos: Mapping[str, TensorInfo], expected: Shapes) -> list[str]:
    """What is missing, unknown or of another shape, in words."""
    found = [f"{key} is missing" for key in expected if key not in infos]
    found += [f"{key} is unknown" for key in infos if key not in expected]
    return found + [
        f"{key} has shape {list(infos[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in infos and infos[key].shape != shape
    ]

"""Which autoencoder a folder holds: its config.json says it, and nothing else in the project asks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from megasora.config.dc_ae import CLASS_NAME as DC_AE
from megasora.config.errors import UserError
from megasora.config.schema import EncodersConfig
from megasora.models.autoencoders import hunyuan
from megasora.models.autoencoders.autoencoder import Autoencoder, AutoencoderFacts, Network
from megasora.models.autoencoders.dc_ae.network import DCAENetwork
from megasora.models.autoencoders.hunyuan import HunyuanNetwork
from megasora.models.autoencoders.tiling import Tiling


class Kind(Protocol):
    """A class of networks."""

    def load(self, folder: Path, *, dtype: torch.dtype) -> Network:
        """From a folder."""
        ...

    def blank(self, facts: Mapping[str, Any]) -> Network:
        """Of the sizes in a config.json, or of the published ones, without trained weights."""
        ...


KINDS: Mapping[str, Kind] = {hunyuan.CLASS_NAME: HunyuanNetwork, DC_AE: DCAENetwork}
"""Autoencoders of clips, by the class that their config.json names."""
CURES = {
    "AutoencoderDC": "it is of pictures: make a video DC-AE of it with megasora convert SRC DST --to dc-ae",
    "AutoencoderKL": "it is of pictures: FLUX's goes to --t2i_vae",
}
"""What to do with the folder of another class."""


def load_autoencoder(config: EncodersConfig, *, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """The autoencoder of a run's settings.

    Raises:
        UserError: the folder is missing, holds something else, or does not load.
    """
    folder = Path(str(config.vae))
    kind, _ = _kind_of(folder)
    autoencoder = Autoencoder(kind.load(folder, dtype=dtype), tiling=Tiling.of(config), scaling_factor=config.scaling_factor)
    autoencoder.to(device)
    return autoencoder


def blank_autoencoder(config: EncodersConfig, *, dtype: torch.dtype) -> Autoencoder | None:
    """On the meta device, the autoencoder of a run's folder, or without one the published one that compresses as the settings say.

    None where no published one does.

    Raises:
        UserError: the folder's configuration is none of an autoencoder.
    """
    with torch.device("meta"):
        if config.vae is not None:
            kind, facts = _kind_of(Path(config.vae))
            network: Network | None = kind.blank(facts)
        else:
            published = (kind.blank({}) for kind in KINDS.values())
            network = next((one for one in published if not mismatches(one.facts, config)), None)
        if network is None:
            return None
        network.module.to(dtype)
        return Autoencoder(network, tiling=Tiling.of(config), scaling_factor=config.scaling_factor)


def mismatches(facts: AutoencoderFacts, config: EncodersConfig) -> list[str]:
    """Settings that say something else of the autoencoder than it does, each with its cure."""
    wanted = {name: getattr(config, name) for name in ("temporal_compression", "spatial_compression", "causal")}
    return [
        f"encoders.{name} is {value} and {facts.name}'s is {getattr(facts, name)}: give another --encoders.vae, or take its recipe"
        for name, value in wanted.items()
        if getattr(facts, name) != value
    ]


def _kind_of(folder: Path) -> tuple[Kind, dict[str, Any]]:
    """The class of networks in a folder and its config.json.

    Raises:
        UserError: there is no config.json, or one of something else.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"encoders.vae {folder} is no autoencoder's folder (no config.json); give one of {' or '.join(KINDS)}")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        name = str(facts.get("_class_name"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"encoders.vae {file} is no configuration of an autoencoder: {error}") from error
    if name not in KINDS:
        cure = CURES.get(name, f"give the folder of {' or '.join(KINDS)}")
        raise UserError(f"encoders.vae {folder} is of class {name}; {cure}")
    return KINDS[name], facts

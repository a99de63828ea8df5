"""The video DC-AE as an autoencoder of the project: its folder (config.json and model.safetensors), and clips through it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megasora.config.dc_ae import CLASS_NAME, WEIGHTS_FILE, DCAEConfig, parse_config, read_config
from megasora.config.errors import UserError
from megasora.models.autoencoders.autoencoder import AutoencoderFacts
from megasora.models.autoencoders.dc_ae.model import VideoDCAE
from megasora.models.autoencoders.posterior import Posterior


class DCAENetwork:
    """See `autoencoder.Network`."""

    def __init__(self, module: VideoDCAE) -> None:
        self.module = module
        config = module.config
        self.facts = AutoencoderFacts(
            name=CLASS_NAME,
            temporal_compression=config.temporal_compression,
            spatial_compression=config.spatial_compression,
            latent_channels=config.latent_channels,
            causal=False,
            scaling_factor=config.scaling_factor,
        )

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype) -> DCAENetwork:
        """From our folder.

        Raises:
            UserError: it does not load, or has not exactly the tensors of its sizes.
        """
        with torch.device("meta"):
            module = VideoDCAE(read_config(folder))
        fill_from(module, folder / WEIGHTS_FILE, dtype=dtype)
        return cls(module)

    @classmethod
    def blank(cls, facts: Mapping[str, Any]) -> DCAENetwork:
        """Without trained weights, of the sizes in a config.json; of the published ones where there is nothing.

        Raises:
            UserError: no sizes of this class.
        """
        return cls(VideoDCAE(parse_config(facts, where="encoders.vae") if facts else DCAEConfig()))

    def moments(self, pixels: Tensor) -> Tensor:
        """[1, C, t, h, w]: the latent; there is no spread."""
        latent: Tensor = self.module.encoder(pixels)
        return latent

    def posterior(self, moments: Tensor) -> Posterior:
        """The latent itself."""
        return Posterior(mean=moments[0], std=torch.zeros_like(moments[0]))

    def pixels(self, z: Tensor) -> Tensor:
        """[1, 3, T, H, W] of a latent."""
        video: Tensor = self.module.decoder(z)
        return video


def fill_from(module: VideoDCAE, file: Path, *, dtype: torch.dtype) -> None:
    """Give a module the tensors of a file.

    Raises:
        UserError: the file cannot be read, or tensors are missing, unknown or of other shapes.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"encoders.vae {file} does not load as {CLASS_NAME}: {str(error).splitlines()[0]}") from error
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    if lacking := [key for key in expected if key not in tensors]:
        raise UserError(f"encoders.vae {file.parent} lacks {len(lacking)} tensors of {CLASS_NAME}, the first {lacking[0]}")
    wrong = [key for key, tensor in tensors.items() if expected.get(key) != tuple(tensor.shape)]
    if wrong:
        shape = list(tensors[wrong[0]].shape)
        raise UserError(
            f"encoders.vae {file.parent} has {len(wrong)} tensors that its config.json does not, the first {wrong[0]} {shape}; "
            "convert it again with megasora convert --to dc-ae"
        )
    module.load_state_dict({key: tensor.to(dtype) for key, tensor in tensors.items()}, strict=True, assign=True)

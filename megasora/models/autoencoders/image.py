"""FLUX's 2D autoencoder (diffusers' AutoencoderKL): 8x8 compression, 16 channels, for the pictures of a FLUX model.

Scaled latent = (z - shift_factor) x scaling_factor, 0.1159 and 0.3611. Source: black-forest-labs/flux src/flux/util.py (ae_params).
It knows no time: frames are pictures beside each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from megasora.config.errors import UserError
from megasora.models.autoencoders.autoencoder import Autoencoder, AutoencoderFacts
from megasora.models.autoencoders.posterior import Posterior

CLASS_NAME = "AutoencoderKL"
PUBLISHED: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""Sizes of the single file (ae.safetensors): ch 128, ch_mult (1, 2, 4, 4), num_res_blocks 2, z_channels 16."""


class ImageNetwork:
    """See `autoencoder.Network`."""

    def __init__(self, module: AutoencoderKL) -> None:
        self.module = module
        config = module.config
        self.facts = AutoencoderFacts(
            name=CLASS_NAME,
            temporal_compression=1,
            spatial_compression=2 ** (len(config.block_out_channels) - 1),
            latent_channels=int(config.latent_channels),
            causal=True,
            scaling_factor=float(config.scaling_factor),
            shift_factor=float(config.shift_factor or 0.0),
        )

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype) -> ImageNetwork:
        """From a diffusers folder (config.json and safetensors).

        Raises:
            UserError: it does not load, or lacks a tensor.
        """
        try:
            vae, loading = AutoencoderKL.from_pretrained(str(folder), torch_dtype=dtype, local_files_only=True, output_loading_info=True)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise UserError(f"{folder} does not load as {CLASS_NAME}: {str(error).splitlines()[0]}") from error
        if lacking := sorted(loading["missing_keys"]):
            raise UserError(f"{folder} lacks {len(lacking)} tensors of {CLASS_NAME}, the first {lacking[0]}")
        return cls(vae)

    @classmethod
    def blank(cls, facts: Mapping[str, Any]) -> ImageNetwork:
        """Without weights, of the sizes in a config.json; of the published ones where there is nothing."""
        return cls(AutoencoderKL.from_config(dict(facts)) if facts else AutoencoderKL(**PUBLISHED))

    def moments(self, pixels: Tensor) -> Tensor:
        """[1, 2 C, T, h, w]: mean and log variance of each frame."""
        encoded = self.module.encoder(pixels[0].movedim(1, 0))
        moments: Tensor = encoded if self.module.quant_conv is None else self.module.quant_conv(encoded)
        return moments.movedim(0, 1)[None]

    def posterior(self, moments: Tensor) -> Posterior:
        """Of moments."""
        latent = DiagonalGaussianDistribution(moments)
        return Posterior(mean=latent.mean[0], std=latent.std[0])

    def pixels(self, z: Tensor) -> Tensor:
        """[1, 3, T, H, W] of a latent, frame by frame."""
        frames = z[0].movedim(1, 0)
        pictures: Tensor = self.module.decoder(frames if self.module.post_quant_conv is None else self.module.post_quant_conv(frames))
        return pictures.movedim(0, 1)[None]


def load_image_autoencoder(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """Load a diffusers folder, a whole FLUX pipeline's, or the published single file.

    Raises:
        UserError: it is missing or holds something else.
    """
    path = Path(path)
    if path.is_dir() and (path / "vae" / "config.json").is_file():
        path = path / "vae"
    if path.is_file():
        network = ImageNetwork(_from_file(path).to(dtype))
    elif (path / "config.json").is_file():
        network = ImageNetwork.load(path, dtype=dtype)
    else:
        raise UserError(f"{path} is no autoencoder: give FLUX's ae.safetensors, or the diffusers folder of an AutoencoderKL")
    autoencoder = Autoencoder(network, tiling=None)
    autoencoder.to(device)
    return autoencoder


def _from_file(path: Path) -> AutoencoderKL:
    """The published single file; diffusers' own converter renames its tensors."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        with torch.device("meta"):
            vae = AutoencoderKL(**PUBLISHED)
        vae.load_state_dict(convert_ldm_vae_checkpoint(tensors, vae.config), strict=True, assign=True)
    except Exception as error:  # safetensors and the converter raise errors of many kinds
        raise UserError(f"{path} is not FLUX's autoencoder (ae.safetensors): {str(error).splitlines()[0]}") from error
    return vae

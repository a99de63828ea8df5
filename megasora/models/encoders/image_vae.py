"""FLUX's 2D autoencoder (diffusers' AutoencoderKL): 8x8 compression, 16 channels, for the pictures of a FLUX model.

Scaled latent = (z - shift_factor) x scaling_factor, 0.1159 and 0.3611. Source: black-forest-labs/flux src/flux/util.py (ae_params).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from megasora.config.errors import UserError

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


class ImageVAE:
    """One picture per call."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.scaling_factor, self.shift_factor = float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0)
        self.latent_channels = int(vae.config.latent_channels)
        self.spatial_compression = 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device, dtype: torch.dtype) -> ImageVAE:
        """Load a diffusers folder (config.json and safetensors) or the published single file.

        Raises:
            UserError: it is missing or holds something else.
        """
        path = Path(path)
        if path.is_dir() and (path / "vae" / "config.json").is_file():
            path = path / "vae"  # a whole FLUX pipeline
        if path.is_file():
            return cls(_from_file(path).to(device, dtype))
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is no autoencoder: give FLUX's ae.safetensors, or the diffusers folder of an AutoencoderKL")
        try:
            vae, loading = AutoencoderKL.from_pretrained(str(path), torch_dtype=dtype, local_files_only=True, output_loading_info=True)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise UserError(f"{path} does not load as AutoencoderKL: {str(error).splitlines()[0]}") from error
        if lacking := sorted(loading["missing_keys"]):
            raise UserError(f"{path} lacks {len(lacking)} tensors of AutoencoderKL, the first {lacking[0]}")
        return cls(vae.to(device))

    @torch.no_grad()
    def encode(self, picture: Float[Tensor, "3 H W"]) -> Float[Tensor, "C h w"]:
        """Scaled latent (posterior mean) of a picture in [-1, 1]."""
        z: Tensor = self.vae.encode(picture[None].to(self.vae.device, self.vae.dtype)).latent_dist.mean[0]
        return (z - self.shift_factor) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "C h w"]) -> Float[Tensor, "3 H W"]:
        """Picture in [-1, 1] (not clamped) of a scaled latent."""
        z = (latent / self.scaling_factor + self.shift_factor)[None].to(self.vae.device, self.vae.dtype)
        picture: Tensor = self.vae.decode(z).sample[0]
        return picture


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

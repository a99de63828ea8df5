"""HunyuanVideo's causal 3D autoencoder (diffusers' AutoencoderKLHunyuanVideo): 4x8x8 compression, 16 channels, scaling 0.476986.

A clip goes through whole in time, as the released weights were trained (hpcaitech/Open-Sora configs: use_temporal_tiling=False); diffusers'
own encode and decode would cut it into 17-frame tiles. In space it is cut into tiles (`Tiling`), as the released weights were, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from megasora.config.errors import UserError
from megasora.models.autoencoders.autoencoder import AutoencoderFacts
from megasora.models.autoencoders.posterior import Posterior

CLASS_NAME = "AutoencoderKLHunyuanVideo"


class HunyuanNetwork:
    """See `autoencoder.Network`."""

    def __init__(self, module: AutoencoderKLHunyuanVideo) -> None:
        self.module = module
        config = module.config
        self.facts = AutoencoderFacts(
            name=CLASS_NAME,
            temporal_compression=int(config.temporal_compression_ratio),
            spatial_compression=int(config.spatial_compression_ratio),
            latent_channels=int(config.latent_channels),
            causal=True,
            scaling_factor=float(config.scaling_factor),
        )

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype) -> HunyuanNetwork:
        """From a diffusers folder (config.json and safetensors).

        Raises:
            UserError: it does not load, or lacks a tensor.
        """
        try:
            vae, loading = AutoencoderKLHunyuanVideo.from_pretrained(
                str(folder), torch_dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"encoders.vae {folder} does not load as {CLASS_NAME}: {str(error).splitlines()[0]}") from error
        if lacking := sorted(loading["missing_keys"]):
            raise UserError(f"encoders.vae {folder} lacks {len(lacking)} tensors of {CLASS_NAME}, the first {lacking[0]}")
        return cls(vae)

    @classmethod
    def blank(cls, facts: Mapping[str, Any]) -> HunyuanNetwork:
        """Without weights, of the sizes in a config.json; of the published ones where there is nothing.

        Raises:
            UserError: no sizes of this class.
        """
        try:
            return cls(AutoencoderKLHunyuanVideo.from_config(dict(facts) or {"_class_name": CLASS_NAME}))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"encoders.vae has no configuration of {CLASS_NAME}: {str(error).splitlines()[0]}") from error

    def moments(self, pixels: Tensor) -> Tensor:
        """[1, 2 C, t, h, w]: mean and log variance."""
        moments: Tensor = self.module.quant_conv(self.module.encoder(pixels))
        return moments

    def posterior(self, moments: Tensor) -> Posterior:
        """Of moments."""
        latent = DiagonalGaussianDistribution(moments)
        return Posterior(mean=latent.mean[0], std=latent.std[0])

    def pixels(self, z: Tensor) -> Tensor:
        """[1, 3, T, H, W] of a latent."""
        video: Tensor = self.module.decoder(self.module.post_quant_conv(z))
        return video

"""HunyuanVideo's causal 3D autoencoder (diffusers' AutoencoderKLHunyuanVideo): 4x8x8 compression, 16 channels, scaling 0.476986."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from jaxtyping import Float
from torch import Tensor

from megasora.config.errors import UserError
from megasora.models.encoders.posterior import Posterior


class HunyuanVAE:
    """One whole sample per call, so that a latent never depends on what else was in the batch."""

    def __init__(self, vae: AutoencoderKLHunyuanVideo) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.scaling_factor = float(vae.config.scaling_factor)
        self.latent_channels = int(vae.config.latent_channels)
        self.temporal_compression = int(vae.config.temporal_compression_ratio)
        self.spatial_compression = int(vae.config.spatial_compression_ratio)

    @classmethod
    def from_folder(cls, folder: str | Path, *, device: torch.device, dtype: torch.dtype) -> HunyuanVAE:
        """Load a diffusers folder (config.json and safetensors).

        Raises:
            UserError: the folder is missing or holds something else.
        """
        if not (Path(folder) / "config.json").is_file():
            raise UserError(
                f"encoders.vae {folder} is no diffusers folder (no config.json); give the folder of an AutoencoderKLHunyuanVideo"
            )
        try:
            vae, loading = AutoencoderKLHunyuanVideo.from_pretrained(
                str(folder), torch_dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"encoders.vae {folder} does not load as AutoencoderKLHunyuanVideo: {str(error).splitlines()[0]}") from error
        if lacking := sorted(loading["missing_keys"]):
            raise UserError(f"encoders.vae {folder} lacks {len(lacking)} tensors of AutoencoderKLHunyuanVideo, the first {lacking[0]}")
        return cls(vae.to(device))

    @torch.no_grad()
    def posterior(self, video: Float[Tensor, "3 T H W"]) -> Posterior:
        """Latent distribution of a clip in [-1, 1], not scaled."""
        assert video.is_floating_point(), "pixels are normalised to [-1, 1] before they are encoded"  # levels would pass unnoticed
        latent = self.vae.encode(video[None].to(self.vae.device, self.vae.dtype)).latent_dist
        return Posterior(mean=latent.mean[0], std=latent.std[0])

    def encode(self, video: Float[Tensor, "3 T H W"], *, noise: Tensor | None = None) -> Float[Tensor, "C t h w"]:
        """Scaled latent of a clip in [-1, 1]: the posterior mean, or mean + std x noise when noise [C, t, h, w] is given."""
        posterior = self.posterior(video)
        return (posterior.mean if noise is None else posterior.with_noise(noise)) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "C t h w"]) -> Float[Tensor, "3 T H W"]:
        """Clip in [-1, 1] (not clamped) of a scaled latent."""
        video: Tensor = self.vae.decode((latent[None] / self.scaling_factor).to(self.vae.device, self.vae.dtype)).sample[0]
        return video

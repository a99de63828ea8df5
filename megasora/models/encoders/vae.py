"""HunyuanVideo's causal 3D autoencoder (diffusers' AutoencoderKLHunyuanVideo): 4x8x8 compression, 16 channels, scaling 0.476986.

A clip goes through whole in time, as the released weights were trained (hpcaitech/Open-Sora configs: use_temporal_tiling=False); diffusers'
own encode and decode would cut it into 17-frame tiles. In space it is cut into tiles (`Tiling`), as the released weights were, too.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float
from torch import Tensor

from megasora.config.errors import UserError
from megasora.models.encoders.posterior import Posterior
from megasora.models.encoders.tiling import Tiling, tiled


class HunyuanVAE:
    """One whole sample per call, so that a latent never depends on what else was in the batch."""

    def __init__(self, vae: AutoencoderKLHunyuanVideo, *, tiling: Tiling | None) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.tiling = tiling
        self.scaling_factor = float(vae.config.scaling_factor)
        self.latent_channels = int(vae.config.latent_channels)
        self.temporal_compression = int(vae.config.temporal_compression_ratio)
        self.spatial_compression = int(vae.config.spatial_compression_ratio)

    @classmethod
    def from_folder(cls, folder: str | Path, *, device: torch.device, dtype: torch.dtype, tiling: Tiling | None) -> HunyuanVAE:
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
        return cls(vae.to(device), tiling=tiling)

    @torch.no_grad()
    def posterior(self, video: Float[Tensor, "3 T H W"]) -> Posterior:
        """Latent distribution of a clip in [-1, 1], not scaled."""
        assert video.is_floating_point(), "pixels are normalised to [-1, 1] before they are encoded"  # levels would pass unnoticed
        pixels = video[None].to(self.vae.device, self.vae.dtype)
        if self.tiling is not None and self.tiling.cuts(*video.shape[-2:]):
            sides = (self.tiling.size, self.tiling.size // self.spatial_compression)
            moments = tiled(pixels, self._moments, tile=sides, overlap=self.tiling.overlap)
            assert moments is not None  # no group: it is computed here
        else:
            moments = self._moments(pixels)
        latent = DiagonalGaussianDistribution(moments)
        return Posterior(mean=latent.mean[0], std=latent.std[0])

    def encode(self, video: Float[Tensor, "3 T H W"], *, noise: Tensor | None = None) -> Float[Tensor, "C t h w"]:
        """Scaled latent of a clip in [-1, 1]: the posterior mean, or mean + std x noise when noise [C, t, h, w] is given."""
        posterior = self.posterior(video)
        return (posterior.mean if noise is None else posterior.with_noise(noise)) * self.scaling_factor

    @torch.no_grad()
    def decode(
        self, latent: Float[Tensor, "C t h w"], *, group: dist.ProcessGroup | None = None, to: int = 0
    ) -> Float[Tensor, "3 T H W"] | None:
        """Clip in [-1, 1] (not clamped) of a scaled latent.

        Args:
            latent: on every rank of the group.
            group: ranks that share out the tiles, bit for bit what one rank alone makes of them.
            to: rank within the group that gets the clip; the others get None.
        """
        z = (latent[None] / self.scaling_factor).to(self.vae.device, self.vae.dtype)
        ratio = self.spatial_compression
        if self.tiling is not None and self.tiling.cuts(*(side * ratio for side in latent.shape[-2:])):
            sides = (self.tiling.size // ratio, self.tiling.size)
            video = tiled(z, self._pixels, tile=sides, overlap=self.tiling.overlap, group=group, to=to)
        elif group is None or group.rank() == to:
            video = self._pixels(z)
        else:
            video = None
        return None if video is None else video[0]

    def _moments(self, pixels: Tensor) -> Tensor:
        """[1, 2 C, t, h, w]: mean and log variance of a clip or a tile of one."""
        moments: Tensor = self.vae.quant_conv(self.vae.encoder(pixels))
        return moments

    def _pixels(self, z: Tensor) -> Tensor:
        """[1, 3, T, H, W] of an unscaled latent or a tile of one."""
        video: Tensor = self.vae.decoder(self.vae.post_quant_conv(z))
        return video

"""Memory an autoencoder takes for one clip, counted on the meta device: the networks run, nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from megasora.config.errors import UserError
from megasora.config.latent_frames import latent_frames
from megasora.config.schema import EncodersConfig
from megasora.models.encoders.bundle import be_quiet
from megasora.models.encoders.tiling import Tiling
from megasora.models.encoders.vae import HunyuanVAE
from megasora.perf.allocations import Allocations


class AutoencoderMemory:
    """Bytes of the autoencoder beside everything else on its GPU.

    Attention of the middle blocks is counted as torch composes it, with its scores; a kernel that keeps none needs less. Work space of
    convolutions is the library's own choice and is not counted.

    Args:
        config: folder (None takes the published sizes), number format and tiles.

    Raises:
        UserError: the folder's configuration is no AutoencoderKLHunyuanVideo's.
    """

    def __init__(self, config: EncodersConfig) -> None:
        be_quiet()
        self._dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
        with torch.device("meta"):
            self._vae = HunyuanVAE(_network(config.vae).to(self._dtype), tiling=Tiling.of(config))
        self._parameters = list(self._vae.vae.parameters())
        self.weights = sum(parameter.nbytes for parameter in self._parameters)

    def encode(self, *, num_frames: int, height: int, width: int) -> int:
        """At most, for a clip of this size in pixels, with its pixels and its latent."""
        return self._peak(self._vae.posterior, (3, num_frames, height, width))

    def decode(self, *, num_frames: int, height: int, width: int) -> int:
        """At most, for a clip of this size in pixels, with its latent and its pixels."""
        ratio = self._vae.spatial_compression
        frames = latent_frames(num_frames, compression=self._vae.temporal_compression, causal=True)
        return self._peak(self._vae.decode, (self._vae.latent_channels, frames, height // ratio, width // ratio))

    def _peak(self, through: Callable[[Tensor], object], shape: tuple[int, ...]) -> int:
        given = torch.empty(shape, dtype=self._dtype, device="meta")
        with torch.device("meta"), Allocations([*self._parameters, given]) as counted:
            through(given)
        return counted.peak + given.nbytes


def _network(folder: str | None) -> AutoencoderKLHunyuanVideo:
    """The class with a folder's sizes, without its weights."""
    if folder is None:
        return AutoencoderKLHunyuanVideo()
    try:
        return AutoencoderKLHunyuanVideo.from_config(AutoencoderKLHunyuanVideo.load_config(str(Path(folder)), local_files_only=True))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"encoders.vae {folder} has no configuration of AutoencoderKLHunyuanVideo: {str(error).splitlines()[0]}") from error

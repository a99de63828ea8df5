"""Memory an autoencoder takes for one clip, counted on the meta device: the networks run, nothing is computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo

from megasora.config.errors import UserError
from megasora.config.latent_frames import latent_frames
from megasora.config.schema import EncodersConfig
from megasora.models.encoders.bundle import be_quiet
from megasora.models.encoders.tiling import Tiling
from megasora.models.encoders.vae import HunyuanVAE
from megasora.perf.allocations import Allocations


@dataclass(frozen=True, kw_only=True)
class AutoencoderMemory:
    """Bytes of the autoencoder beside everything else on its GPU.

    Attention of the middle blocks is counted as torch composes it, with its scores; a kernel that keeps none needs less. Work space of
    convolutions is the library's own choice and is not counted.
    """

    weights: int
    encode: int
    """At most, with the clip's pixels and its latent."""
    decode: int
    """At most, with the latent and the clip's pixels."""


def autoencoder_memory(config: EncodersConfig, *, num_frames: int, height: int, width: int) -> AutoencoderMemory:
    """Memory for one clip of this size.

    Args:
        config: folder (None takes the published sizes), number format and tiles.
        num_frames, height, width: of the clip, in pixels.

    Raises:
        UserError: the folder's configuration is no AutoencoderKLHunyuanVideo's.
    """
    be_quiet()
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    with torch.device("meta"):
        vae = HunyuanVAE(_network(config.vae).to(dtype), tiling=Tiling.of(config))
        video = torch.empty(3, num_frames, height, width, dtype=dtype)
        ratio = vae.spatial_compression
        frames = latent_frames(num_frames, compression=vae.temporal_compression, causal=True)
        latent = torch.empty(vae.latent_channels, frames, height // ratio, width // ratio, dtype=dtype)
        weights = list(vae.vae.parameters())
        with Allocations([*weights, video]) as encoding:
            vae.posterior(video)
        with Allocations([*weights, latent]) as decoding:
            vae.decode(latent)
    return AutoencoderMemory(
        weights=sum(weight.nbytes for weight in weights), encode=encoding.peak + video.nbytes, decode=decoding.peak + latent.nbytes
    )


def _network(folder: str | None) -> AutoencoderKLHunyuanVideo:
    """The class with a folder's sizes, without its weights."""
    if folder is None:
        return AutoencoderKLHunyuanVideo()
    try:
        return AutoencoderKLHunyuanVideo.from_config(AutoencoderKLHunyuanVideo.load_config(str(Path(folder)), local_files_only=True))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"encoders.vae {folder} has no configuration of AutoencoderKLHunyuanVideo: {str(error).splitlines()[0]}") from error

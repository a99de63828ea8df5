"""Small random autoencoders of the real classes, in the real folder formats: the one that compresses as a run's settings say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors.torch import save_file
from torch import Tensor

from megasora.config.dc_ae import TINY, WEIGHTS_FILE, write_config
from megasora.config.errors import UserError
from megasora.config.schema import EncodersConfig
from megasora.models.autoencoders.dc_ae.model import VideoDCAE

LATENT_STD = 1.0
"""The scaling factor is chosen so that latents of noise have this standard deviation, as trained ones have."""
Compression = tuple[int, int, bool]
"""(temporal, spatial, causal)"""


@torch.no_grad()
def make_tiny_autoencoder(folder: Path, *, latent_channels: int, config: EncodersConfig) -> None:
    """Write one from torch's random state.

    Args:
        folder: does not exist yet.
        latent_channels: of the latents.
        config: the compression that it must have.

    Raises:
        UserError: none compresses so.
    """
    wanted: Compression = (config.temporal_compression, config.spatial_compression, config.causal)
    if wanted not in MAKERS:
        known = "; ".join(f"{t}x{s}x{s}, causal {causal}" for t, s, causal in MAKERS)
        raise UserError(f"there is no tiny autoencoder of {wanted[0]}x{wanted[1]}x{wanted[1]}, causal {wanted[2]}; there are {known}")
    MAKERS[wanted](folder, latent_channels)


def _noise(frames: int) -> Tensor:
    """A smooth clip [1, 3, frames, 64, 64]."""
    coarse = torch.randn(1, 3, frames, 8, 8)
    return torch.nn.functional.interpolate(coarse, size=(frames, 64, 64), mode="trilinear").clamp(-1, 1)


def _make_hunyuan(folder: Path, latent_channels: int) -> None:
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=latent_channels,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=1.0,
    )
    std = float(vae.encode(_noise(5)).latent_dist.mean.std())
    vae.register_to_config(scaling_factor=LATENT_STD / std)
    vae.save_pretrained(str(folder))


def _make_dc_ae(folder: Path, latent_channels: int) -> None:
    """Its start values make it nearly its shortcuts: coarse pictures come back blurred."""
    config = replace(TINY, latent_channels=latent_channels)
    if wrong := config.problems():
        raise UserError(f"a tiny DC-AE: {wrong[0]}; change --model.in_channels")
    network = VideoDCAE(config)
    std = float(network.encoder(_noise(8)).std())
    folder.mkdir(parents=True)
    write_config(folder, replace(config, scaling_factor=LATENT_STD / std))
    save_file(network.state_dict(), folder / WEIGHTS_FILE, metadata={"format": "pt"})


MAKERS: dict[Compression, Callable[[Path, int], None]] = {(4, 8, True): _make_hunyuan, (4, 32, False): _make_dc_ae}
"""By what they compress."""

"""Autoencoders whose results are known, and clips for them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megasora import cli
from megasora.config.errors import UserError
from megasora.config.schema import EncodersConfig, SlabAxis
from megasora.evaluation.autoencoders.measure import Tools
from megasora.models.autoencoders.autoencoder import Autoencoder, AutoencoderFacts, Network
from megasora.models.autoencoders.posterior import Posterior
from megasora.models.autoencoders.tiny import make_tiny_autoencoder
from tests.unit.evaluation.clips import noise, write_exact


class Shifting:
    """The latent is the clip's pixels; what comes back is `levels` of 255 brighter, and has a posterior of deviation `spread`."""

    def __init__(self, *, levels: float = 0.0, spread: float = 0.0) -> None:
        self.levels, self.spread = levels, spread
        self.module = nn.Linear(1, 1)
        self.facts = AutoencoderFacts(
            name="Shifting", temporal_compression=1, spatial_compression=1, latent_channels=3, causal=True, scaling_factor=3.7
        )

    def moments(self, pixels: Tensor) -> Tensor:
        return pixels

    def posterior(self, moments: Tensor) -> Posterior:
        return Posterior(mean=moments[0], std=torch.full_like(moments[0], self.spread))

    def pixels(self, z: Tensor) -> Tensor:
        return z + self.levels / 127.5

    def in_slabs(self, group: dist.ProcessGroup, *, axis: SlabAxis) -> Network:
        raise UserError("not in slabs")


def shifting(*, levels: float = 0.0, spread: float = 0.0) -> Autoencoder:
    return Autoencoder(Shifting(levels=levels, spread=spread), tiling=None)


def no_weights(pool: ThreadPoolExecutor) -> Tools:
    return Tools(lpips=None, fid=None, fvd=None, pool=pool)


def clip_of(frames: Tensor) -> Tensor:
    """[3, T, H, W] uint8 of levels [T, H, W, 3]."""
    return frames.permute(3, 0, 1, 2).to(torch.uint8)


def tiny(folder: Path, *, kind: str = "dc-ae", seed: int = 0) -> Path:
    """A random autoencoder's folder: 4x32x32, not causal, or 4x8x8, causal."""
    config = EncodersConfig(spatial_compression=32, causal=False) if kind == "dc-ae" else EncodersConfig()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make_tiny_autoencoder(folder, latent_channels=16 if kind == "dc-ae" else 4, config=config)
    return folder


def write_clips(folder: Path, count: int = 3, *, frames: int = 8) -> Path:
    for number in range(count):
        write_exact(folder / f"clip{number}.mp4", noise(frames, 32, 32, seed=number, high=60 + 60 * number))
    return folder


def evaluate(*words: object, code: int = 0) -> None:
    """Run the command; asserts its exit code."""
    try:
        cli.main(["evaluate", "ae", *map(str, words), "--device", "cpu"])
        found = 0
    except SystemExit as end:
        found = int(end.code or 0)
    assert found == code

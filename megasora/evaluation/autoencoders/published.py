"""Published figures of autoencoders of clips (Open-Sora 2.0, arXiv 2503.09642 v3, table 1), to stand beside measured ones.

The paper does not say which clips, which size and whether tiles were used; LPIPS is AlexNet's spatial mean, all on 8-bit frames.
"""

from __future__ import annotations

from dataclasses import dataclass

from megasora.models.autoencoders.autoencoder import AutoencoderFacts


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of the table."""

    name: str
    compression: tuple[int, int]
    """Frames and pixels a side."""
    channels: int
    causal: bool
    lpips: float
    psnr: float
    ssim: float


TABLE = (
    Published(name="Open-Sora 1.2", compression=(4, 8), channels=4, causal=True, lpips=0.161, psnr=27.504, ssim=0.756),
    Published(name="StepVideo", compression=(8, 16), channels=64, causal=True, lpips=0.082, psnr=28.719, ssim=0.818),
    Published(name="HunyuanVideo", compression=(4, 8), channels=16, causal=True, lpips=0.046, psnr=30.240, ssim=0.856),
    Published(name="Video DC-AE", compression=(4, 32), channels=128, causal=False, lpips=0.051, psnr=30.538, ssim=0.863),
    Published(name="Video DC-AE", compression=(4, 32), channels=256, causal=False, lpips=0.049, psnr=30.777, ssim=0.872),
)
PARAMETERS = {("AutoencoderKLHunyuanVideo", 16): 246_478_803, ("VideoDCAE", 128): 459_462_147, ("VideoDCAE", 256): 466_540_163}
"""Of the published networks, by class and channels: others of the same compression, such as the tiny ones, are not what was measured."""


def published_for(facts: AutoencoderFacts, *, parameters: int) -> Published | None:
    """The row of an autoencoder of these sizes. Whether the weights are the released ones nobody can tell from here."""
    if PARAMETERS.get((facts.name, facts.latent_channels)) != parameters:
        return None
    compression = facts.temporal_compression, facts.spatial_compression
    return next(row for row in TABLE if (row.compression, row.channels, row.causal) == (compression, facts.latent_channels, facts.causal))

"""What every autoencoder is to the rest of the project, whichever networks it has: clips to latents and back, with its rules as data.

A `Network` does one whole clip or one tile; `Autoencoder` cuts, blends, scales, shares tiles out over ranks and refuses what it does not
take. Shape letters: C latent channels, T H W frames, height, width, t h w the same of the latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from megasora.config.errors import UserError
from megasora.config.latent_frames import frame_rule, is_frame_count, latent_frames, nearest_frame_count
from megasora.models.autoencoders.posterior import Posterior
from megasora.models.autoencoders.tiling import Cut, Tiling, tiled


@dataclass(frozen=True, kw_only=True)
class AutoencoderFacts:
    """What decides the shape and the scale of latents."""

    name: str
    """Its class, as its folder's config.json names it."""
    temporal_compression: int
    """Frames per latent frame."""
    spatial_compression: int
    """Pixels per latent pixel."""
    latent_channels: int
    causal: bool
    """Whether frame 0 has a latent frame of its own (4k+1 frames) or not (4k frames)."""
    scaling_factor: float
    """Latents are (z - shift_factor) x scaling_factor in training and sampling."""
    shift_factor: float = 0.0

    def takes(self, num_frames: int) -> bool:
        """Whether clips may have this many frames."""
        return is_frame_count(num_frames, compression=self.temporal_compression, causal=self.causal)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of a clip's latent; sizes in frames and pixels."""
        frames = latent_frames(num_frames, compression=self.temporal_compression, causal=self.causal)
        return self.latent_channels, frames, height // self.spatial_compression, width // self.spatial_compression

    def refuse(self, num_frames: int, height: int, width: int) -> None:
        """Refuse a clip that it does not take.

        Raises:
            UserError: frames, height or width; names the nearest that it takes.
        """
        if not self.takes(num_frames):
            ratio, causal = self.temporal_compression, self.causal
            rule, near = frame_rule(compression=ratio, causal=causal), nearest_frame_count(num_frames, compression=ratio, causal=causal)
            raise UserError(f"{self.name} takes clips of {rule} frames, not {num_frames}; use {near}")
        unit = self.spatial_compression
        if height % unit or width % unit:
            nearest = " x ".join(str(max(1, round(side / unit)) * unit) for side in (height, width))
            raise UserError(f"{self.name} takes heights and widths that divide by {unit}, not {height} x {width}; use {nearest}")


class Network(Protocol):
    """The networks of one kind of autoencoder, on a batch of one clip or tile."""

    @property
    def facts(self) -> AutoencoderFacts:
        """Its rules."""
        ...

    @property
    def module(self) -> nn.Module:
        """All of its parameters."""
        ...

    def moments(self, pixels: Float[Tensor, "1 3 T H W"]) -> Float[Tensor, "1 M t h w"]:
        """What it says of pixels in [-1, 1]; tiles are blended in this form."""
        ...

    def posterior(self, moments: Float[Tensor, "1 M t h w"]) -> Posterior:
        """The latent distribution that moments describe, without batch."""
        ...

    def pixels(self, z: Float[Tensor, "1 C t h w"]) -> Float[Tensor, "1 3 T H W"]:
        """Pixels in [-1, 1], not clamped, of a latent that is not scaled."""
        ...


class Autoencoder:
    """One whole sample per call, so that a latent never depends on what else was in the batch.

    Args:
        network: its networks; they are frozen here.
        tiling: how larger clips are cut; None takes every clip whole.
        scaling_factor: instead of the network's own.
    """

    def __init__(self, network: Network, *, tiling: Tiling | None, scaling_factor: float | None = None) -> None:
        self.network, self.tiling, self.facts = network, tiling, network.facts
        self.module = network.module.eval().requires_grad_(False)
        self.scaling_factor = network.facts.scaling_factor if scaling_factor is None else scaling_factor

    @property
    def device(self) -> torch.device:
        """Where it works."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of its weights, in which it works."""
        return next(self.parameters()).dtype

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of its weights."""
        return self.module.parameters()

    def to(self, device: torch.device | str) -> None:
        """Move it."""
        self.module.to(device)

    @property
    def identity(self) -> str:
        """In words, all but the weights that a latent of it depends on: class, compression, tiles and number format."""
        facts, tiling = self.facts, self.tiling
        compression = f"{facts.temporal_compression}x{facts.spatial_compression}x{facts.spatial_compression}"
        cut = "whole" if tiling is None else f"tiles {tiling.size} px, {tiling.frames or 'all'} frames, overlap {tiling.overlap:g}"
        order = "causal" if facts.causal else "not causal"
        return f"{facts.name} {compression}, {facts.latent_channels} channels, {order}; {cut}; {self.dtype}"

    @torch.no_grad()
    def posterior(self, video: Float[Tensor, "3 T H W"]) -> Posterior:
        """Latent distribution of a clip in [-1, 1], not scaled.

        Raises:
            UserError: a number of frames or pixels that it does not take.
        """
        assert video.is_floating_point(), "pixels are normalised to [-1, 1] before they are encoded"  # levels would pass unnoticed
        self.facts.refuse(*video.shape[-3:])
        pixels = video[None].to(self.device, self.dtype)
        cut = self.cut(*video.shape[-3:])
        if cut is None:
            return self.network.posterior(self.network.moments(pixels))
        moments = tiled(pixels, self.network.moments, cut=cut)
        assert moments is not None  # no group: it is computed here
        return self.network.posterior(moments)

    def encode(self, video: Float[Tensor, "3 T H W"], *, noise: Tensor | None = None) -> Float[Tensor, "C t h w"]:
        """Scaled latent of a clip in [-1, 1]: the posterior mean, or mean + std x noise when noise [C, t, h, w] is given."""
        posterior = self.posterior(video)
        latent = posterior.mean if noise is None else posterior.with_noise(noise)
        return (latent - self.facts.shift_factor) * self.scaling_factor

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
        z = (latent[None] / self.scaling_factor + self.facts.shift_factor).to(self.device, self.dtype)
        facts = self.facts
        cut = self.cut(latent.shape[-3] * facts.temporal_compression, *(side * facts.spatial_compression for side in latent.shape[-2:]))
        if cut is not None:
            video = tiled(z, self.network.pixels, cut=cut.inverse(), group=group, to=to)
        elif group is None or group.rank() == to:
            video = self.network.pixels(z)
        else:
            video = None
        return None if video is None else video[0]

    def cut(self, num_frames: int, height: int, width: int) -> Cut | None:
        """How a clip of this size is cut for encoding; None where it is not."""
        if self.tiling is None:
            return None
        facts = self.facts
        return self.tiling.cut(
            (num_frames, height, width), compression=(facts.temporal_compression, facts.spatial_compression), causal=facts.causal
        )

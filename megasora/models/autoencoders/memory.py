"""Memory an autoencoder takes for one clip, counted on the meta device: the networks run, nothing is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megasora.models.autoencoders.autoencoder import Autoencoder, AutoencoderFacts, Network
from megasora.models.autoencoders.posterior import Posterior
from megasora.perf.allocations import Allocations


class AutoencoderMemory:
    """Bytes of the autoencoder beside everything else on its GPU.

    Attention of the middle blocks is counted as torch composes it, with its scores; a kernel that keeps none needs less. Work space of
    convolutions is the library's own choice and is not counted.

    Args:
        autoencoder: on the meta device (`choice.blank_autoencoder`).
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder
        self._parameters = list(autoencoder.parameters())
        self.weights = sum(parameter.nbytes for parameter in self._parameters)

    def encode(self, *, num_frames: int, height: int, width: int) -> int:
        """At most, for a clip of this size in pixels, with its pixels and its latent."""
        return self._peak(lambda autoencoder, video: autoencoder.posterior(video), (3, num_frames, height, width))

    def decode(self, *, num_frames: int, height: int, width: int) -> int:
        """At most, for a clip of this size in pixels, with its latent and its pixels."""
        shape = self._autoencoder.facts.latent_shape(num_frames, height, width)
        return self._peak(lambda autoencoder, latent: autoencoder.decode(latent), shape)

    def _peak(self, through: Callable[[Autoencoder, Tensor], object], shape: tuple[int, ...]) -> int:
        given = torch.empty(shape, dtype=self._autoencoder.dtype, device="meta")
        with torch.device("meta"), Allocations([*self._parameters, given]) as counted:
            shadow = copy.copy(self._autoencoder)
            shadow.network = _TilesOnce(self._autoencoder.network, counted)
            through(shadow, given)
        return counted.peak + given.nbytes


class _TilesOnce:
    """A network that walks through each size of tile once, and remembers what it took: long clips have many alike."""

    def __init__(self, network: Network, counted: Allocations) -> None:
        self.network, self.counted = network, counted
        self.known: dict[tuple[str, torch.Size], tuple[int, torch.Size]] = {}

    @property
    def facts(self) -> AutoencoderFacts:
        return self.network.facts

    @property
    def module(self) -> nn.Module:
        return self.network.module

    def moments(self, pixels: Tensor) -> Tensor:
        return self._once("moments", self.network.moments, pixels)

    def posterior(self, moments: Tensor) -> Posterior:
        return self.network.posterior(moments)

    def pixels(self, z: Tensor) -> Tensor:
        return self._once("pixels", self.network.pixels, z)

    def _once(self, way: str, through: Callable[[Tensor], Tensor], tile: Tensor) -> Tensor:
        counted, size = self.counted, (way, tile.shape)
        before, peak = counted.live, counted.peak
        if size in self.known:
            own, shape = self.known[size]
            made = torch.empty(shape, dtype=tile.dtype)
        else:
            counted.peak = 0
            made = through(tile)
            own = counted.peak - before
            self.known[size] = own, made.shape
        counted.peak = max(peak, before + own)
        return made

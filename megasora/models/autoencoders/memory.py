"""Memory an autoencoder takes for one clip, counted on the meta device: the networks run, nothing is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megasora.models.autoencoders.autoencoder import Autoencoder
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
        return self._peak(self._autoencoder.posterior, (3, num_frames, height, width))

    def decode(self, *, num_frames: int, height: int, width: int) -> int:
        """At most, for a clip of this size in pixels, with its latent and its pixels."""
        return self._peak(self._autoencoder.decode, self._autoencoder.facts.latent_shape(num_frames, height, width))

    def _peak(self, through: Callable[[Tensor], object], shape: tuple[int, ...]) -> int:
        given = torch.empty(shape, dtype=self._autoencoder.dtype, device="meta")
        with torch.device("meta"), Allocations([*self._parameters, given]) as counted:
            through(given)
        return counted.peak + given.nbytes

"""What an autoencoder says of a clip: mean and standard deviation of its latent, and how training takes a latent from them.

Online encoding and the cache go through the same two lines here, so that they give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megasora.diffusion.philox import normal_at


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """Latent distribution of a clip, without the scaling factor, in the autoencoder's type."""

    mean: Float[Tensor, "C t h w"]
    std: Float[Tensor, "C t h w"]

    def with_noise(self, noise: Float[Tensor, "C t h w"]) -> Float[Tensor, "C t h w"]:
        """mean + std x noise, the noise brought to the autoencoder's type first."""
        return self.mean + self.std * noise.to(self.mean)

    def sample(self, *, key: int, first_element: int = 0) -> Float[Tensor, "C t h w"]:
        """The sample whose noise is the elements from first_element on of a key's draw."""
        return self.sample_at(numbered(self.mean.shape, device=self.mean.device) + first_element, key=key)

    def sample_at(self, elements: Int[Tensor, "C t h w"], *, key: int) -> Float[Tensor, "C t h w"]:
        """The sample whose noise is these elements of a key's draw: of a slab, those that `numbered` gives its places of the whole."""
        return self.with_noise(normal_at(elements, key=key))


def numbered(shape: Sequence[int], *, device: torch.device) -> Int[Tensor, "C t h w"]:
    """Numbers of a latent's elements in a draw."""
    return torch.arange(math.prod(shape), device=device).view(*shape)

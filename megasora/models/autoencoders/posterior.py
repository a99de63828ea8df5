"""What an autoencoder says of a clip: mean and standard deviation of its latent, and how training takes a latent from them.

Online encoding and the cache go through the same two lines here, so that they give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
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
        shape = self.mean.shape
        elements = torch.arange(first_element, first_element + math.prod(shape), device=self.mean.device).view(shape)
        return self.with_noise(normal_at(elements, key=key))

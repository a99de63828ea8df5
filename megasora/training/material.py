"""What a training sample is made from: the latents of a clip and of its given frames, decoded now or read from a cache, and its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from megasora.data.cache.layout import latent_names
from megasora.diffusion.conditions import GivenFrames, held
from megasora.models.autoencoders.autoencoder import Autoencoder
from megasora.models.autoencoders.posterior import Posterior
from megasora.parallel.transfer import send


class LatentMaterial(Protocol):
    """Latents of one clip."""

    def latent(self, run: GivenFrames | None) -> Tensor | Posterior:
        """Of the clip, or of a run of its frames encoded on its own: the posterior, or the one sample a cache holds. Not scaled."""
        ...

    def holding(self, frames: tuple[int, int]) -> LatentMaterial:
        """Of the clip with its first and last picture held for as many frames (`diffusion.conditions.held`)."""
        ...


@dataclass(frozen=True, kw_only=True)
class DecodedClip:
    """Pixels, encoded when asked."""

    video: Tensor
    vae: Autoencoder

    def latent(self, run: GivenFrames | None) -> Posterior:
        """See `LatentMaterial.latent`."""
        return self.vae.posterior(self.video if run is None else self.video[:, run.start : run.start + run.count])

    def holding(self, frames: tuple[int, int]) -> DecodedClip:
        """See `LatentMaterial.holding`."""
        return replace(self, video=held(self.video, frames))


@dataclass(frozen=True, kw_only=True)
class StoredClip:
    """Latents from a cache."""

    tensors: Mapping[str, Tensor]
    device: torch.device

    def latent(self, run: GivenFrames | None) -> Tensor | Posterior:
        """See `LatentMaterial.latent`."""
        place = None if run is None else (run.start, run.count)
        (sample,) = latent_names("sampled", place)
        if sample in self.tensors:
            return send([self.tensors[sample]], device=self.device)[0]
        mean, std = send([self.tensors[name] for name in latent_names("mean_std", place)], device=self.device)
        return Posterior(mean=mean, std=std)

    def holding(self, frames: tuple[int, int]) -> StoredClip:
        """See `LatentMaterial.holding`; a cache holds no such latents, and settings that ask for them were refused."""
        assert frames == (0, 0), "encoders.hold_given with cached latents"
        return self


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a training sample is made from."""

    latents: LatentMaterial
    text: Tensor
    """[L, text_dim]"""
    vec: Tensor
    """[vec_dim]"""


def scaled_latents(
    latents: LatentMaterial, runs: Sequence[GivenFrames] = (), *, posterior: Literal["mean", "sample"], key: int, scaling_factor: float
) -> list[Tensor]:
    """Scaled latents of a clip and of its given frames.

    Args:
        latents: the clip's.
        runs: given frames, encoded on their own.
        posterior: what is taken of a posterior; a cache's one sample is taken as it is.
        key: of the clip's draw; each latent takes the draw's next elements.
        scaling_factor: of the autoencoder.
    """
    result: list[Tensor] = []
    elements = 0
    for run in (None, *runs):
        latent = latents.latent(run)
        if isinstance(latent, Posterior):
            latent = latent.sample(key=key, first_element=elements) if posterior == "sample" else latent.mean
        elements += latent.numel()
        result.append(latent * scaling_factor)
    return result

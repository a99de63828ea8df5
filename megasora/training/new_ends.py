"""Weights of a model for another autoencoder, with new layers where its latents come in and go out.

As the adaptation to the video DC-AE has it (arXiv 2503.09642 section 4.3.3, after PixArt): everything between is kept.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megasora.checkpoint.formats.canonical import canonical_shapes
from megasora.checkpoint.formats.mapping import CanonicalReader
from megasora.checkpoint.source import WeightSource
from megasora.config.schema import ModelConfig
from megasora.diffusion.philox import Stream, key_of, uniform_at

LINEAR, ZERO = ("img_in.", "final_layer.linear."), ("cond_in.",)
"""New layers: as torch's nn.Linear starts, uniform in +-1 / sqrt(inputs), weight and bias; and zero (Open-Sora models/mmdit/model.py)."""


class NewEnds(CanonicalReader):
    """Canonical tensors of a model, those at its ends new.

    Args:
        old: the weights.
        model: sizes wanted.
        seed: of the new values, which every rank draws alike.
    """

    def __init__(self, old: CanonicalReader, *, model: ModelConfig, seed: int) -> None:
        self.reader, self.model, self.seed = old.reader, model, seed
        self.shapes = canonical_shapes(model)
        kept = [key for key in self.shapes if not key.startswith((*LINEAR, *ZERO)) and key in old.segments]
        self.segments = {key: old.segments[key] for key in kept}
        self.infos = {key: old.infos[key] for key in kept}

    def read(self, key: str) -> Tensor:
        """A tensor of the weights, or a new one in fp32."""
        if key in self.segments:
            return super().read(key)
        shape = self.shapes[key]
        if key.startswith(ZERO):
            return torch.zeros(shape)
        layer = key.rpartition(".")[0]
        bound = float(self.shapes[f"{layer}.weight"][1]) ** -0.5
        number = sum((place + 1) * ord(letter) for place, letter in enumerate(key))
        draw = key_of(seed=self.seed, stream=Stream.INIT, sample=number)
        elements = torch.arange(int(torch.Size(shape).numel())).view(shape)
        return ((2 * uniform_at(elements, key=draw) - 1) * bound).float()


def with_new_ends(source: WeightSource, *, model: ModelConfig, seed: int) -> WeightSource:
    """The weights as of a model with this one's ends.

    Args:
        source: weights of a model with other input channels.
        model: the model to start.
        seed: of the new values.
    """
    given = source.model
    wanted = replace(given, in_channels=model.in_channels, patch_size=model.patch_size, cond_embed=model.cond_embed)
    return replace(source, model=wanted, canonical=NewEnds(source.canonical, model=wanted, seed=seed))

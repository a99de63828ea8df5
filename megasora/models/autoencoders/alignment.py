"""How features of an encoder are compared with a teacher's: a projector, and VA-VAE's loss of cosines and of their pairs (arXiv 2501.01423
equations 5 and 6; both terms take the projected features, as hustvl/LightningDiT's code does). Letters as in `teacher`, C the layer's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Pairs = Literal["frame", "clip"]
NUM_LAYERS = 3
"""Of an mlp: REPA's build_mlp."""


class Projector(nn.Module):
    """From a layer's channels to the teacher's, at each place by itself.

    Args:
        channels: of the layer.
        out: of the teacher.
        width: of the inner layers of three with SiLU between (REPA); None: one matrix without bias (VA-VAE).
    """

    def __init__(self, channels: int, out: int, *, width: int | None) -> None:
        super().__init__()
        sizes = [channels, out] if width is None else [channels, *[width] * (NUM_LAYERS - 1), out]
        self.layers = nn.ModuleList(nn.Conv3d(a, b, 1, bias=width is not None) for a, b in zip(sizes[:-1], sizes[1:], strict=True))

    def forward(self, features: Float[Tensor, "1 C t h w"]) -> Float[Tensor, "1 D t h w"]:
        """Projected features."""
        x = features
        for number, layer in enumerate(self.layers):
            x = layer(F.silu(x) if number else x)
        return x

    @torch.no_grad()
    def initialize(self, *, seed: int) -> None:
        """Start values that depend on the seed only (on the CPU): uniform within 1 / sqrt(inputs), torch's own rule of a convolution."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            weight = layer.get_parameter("weight")
            bound = 1 / math.sqrt(weight.shape[1])
            for parameter in layer.parameters():
                parameter.uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """The two terms of a clip; their sum is trained for."""

    cosine: Float[Tensor, ""]
    """Mean over places of relu(1 - margin - cosine)."""
    gram: Float[Tensor, ""]
    """Mean over pairs of places of relu(|difference of their cosines| - margin)."""


def alignment_of(
    projected: Float[Tensor, "D t h w"],
    teacher: Float[Tensor, "D t h w"],
    *,
    cosine_margin: float,
    gram_margin: float,
    pairs: Pairs,
) -> Alignment:
    """Of a clip's features, in fp32 or better."""
    ours, theirs = _unit(projected, pairs), _unit(teacher, pairs)
    cosine = F.relu(1 - cosine_margin - (ours * theirs).sum(dim=-1)).mean()
    difference = ours @ ours.transpose(1, 2) - theirs @ theirs.transpose(1, 2)
    return Alignment(cosine=cosine, gram=F.relu(difference.abs() - gram_margin).mean())


def _unit(features: Tensor, pairs: Pairs) -> Tensor:
    """Unit vectors [groups, places, D], the places of a group being those that are paired."""
    wide = features if features.dtype == torch.float64 else features.float()
    places = wide.flatten(2) if pairs == "frame" else wide.flatten(1)[:, None]
    return F.normalize(places.permute(1, 2, 0), dim=-1)

"""Made clips of coloured shapes that move over a smooth background, and which kinds of shape cover each place; functions of a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 5
"""Disc, ring, square, cross, triangle; 0 is the background."""


@dataclass(frozen=True, kw_only=True)
class Clips:
    """All clips of a set."""

    videos: Tensor
    """[n, 3, T, H, W] in [-1, 1]: the levels again."""
    levels: Tensor
    """uint8, the same."""
    shares: Tensor
    """[n, CLASSES + 1, T / place, H / place, W / place], how much of a place each kind covers; they sum to 1."""


def inside(kind: int, x: Tensor, y: Tensor) -> Tensor:
    """Whether places, in units of a shape's size around its middle, belong to it."""
    radius = (x.square() + y.square()).sqrt()
    square = torch.maximum(x.abs(), y.abs())
    if kind == 1:
        return radius < 1
    if kind == 2:
        return (radius < 1) & (radius > 0.55)
    if kind == 3:
        return square < 0.85
    if kind == 4:
        return (torch.minimum(x.abs(), y.abs()) < 0.35) & (square < 1)
    return (y < 0.8) & (y > 2 * x.abs() - 1)


def make_clips(number: int, *, side: int, frames: int, place: int, seed: int) -> Clips:
    """`number` clips of two or three shapes each."""
    generator = torch.Generator().manual_seed(seed)
    videos, shares = zip(*(_clip(side, frames, place, generator) for _ in range(number)), strict=True)
    levels = ((torch.stack(videos) + 1) * 127.5).round().to(torch.uint8)
    return Clips(videos=levels.float() / 127.5 - 1, levels=levels, shares=torch.stack(shares))


def _clip(side: int, frames: int, place: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def draw(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    coarse = draw(-0.7, 0.7, 1, 3, 4, 4)
    video = F.interpolate(coarse, size=(side, side), mode="bicubic")[0][:, None].repeat(1, frames, 1, 1)
    labels = torch.zeros(frames, side, side, dtype=torch.long)
    rows, columns = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    for _ in range(int(torch.randint(2, 4, (1,), generator=generator))):
        kind = int(torch.randint(1, CLASSES + 1, (1,), generator=generator))
        size = float(draw(0.16, 0.28, 1)) * side
        colour, start, speed = draw(-1, 1, 3, 1), draw(0.15, 0.85, 2) * side, draw(-1.5, 1.5, 2)
        for frame in range(frames):
            middle = start + speed * frame
            covered = inside(kind, (columns - middle[0]) / size, (rows - middle[1]) / size)
            video[:, frame][:, covered] = colour
            labels[frame][covered] = kind
    kinds = F.one_hot(labels, CLASSES + 1).permute(3, 0, 1, 2).float()
    return video.clamp(-1, 1), F.avg_pool3d(kinds, place)

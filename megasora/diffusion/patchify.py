"""Latents <-> tokens: patches of patch x patch latent pixels, channels ordered (c ph pw), tokens ordered (t h w) (FLUX util.sampling)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def patchify(latent: Tensor, *, patch: int) -> Tensor:
    """[C, T, H, W] -> [T (H/p) (W/p), C p p]."""
    return rearrange(latent, "c t (h ph) (w pw) -> (t h w) (c ph pw)", ph=patch, pw=patch)


def unpatchify(tokens: Tensor, *, grid: tuple[int, int, int], patch: int) -> Tensor:
    """[T h w, C p p] -> [C, T, h p, w p]; `grid` is (T, h, w) in tokens."""
    frames, height, width = grid
    return rearrange(tokens, "(t h w) (c ph pw) -> c t (h ph) (w pw)", t=frames, h=height, w=width, ph=patch, pw=patch)


def position_ids(grid: tuple[int, int, int]) -> Tensor:
    """fp64 [T h w, 3]: (t, h, w) of each token."""
    return torch.cartesian_prod(*(torch.arange(extent, dtype=torch.float64) for extent in grid)).reshape(-1, 3)

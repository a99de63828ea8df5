"""Rotary position embedding over (time, height, width), rotate-half layout (Open-Sora v2; FLUX pairs neighbours instead and is permuted at
conversion). Angles are computed in fp64 from the token positions of a context rank; text and dummy tokens stand at position 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """cos and sin of the angle of each token and frequency, [S, 1, K/2]."""

    cos: Tensor
    sin: Tensor


class StreamRotations(NamedTuple):
    """The rotation of a context rank's tokens: joint order, and each stream alone."""

    joint: Rotation
    txt: Rotation
    img: Rotation


def rotation_of(positions: Tensor, *, axes_dim: tuple[int, int, int], theta: float, dtype: torch.dtype) -> Rotation:
    """Angles position x theta^(-2i/d) for each axis of d dims (FLUX math.rope), concatenated over the axes.

    Args:
        positions: fp64 [S, 3].
        axes_dim: rotary dims per axis, summing to the head size K.
        theta: base of the frequencies.
        dtype: of the result; fp32 for fp32 and bf16 models (the rotation is done in fp32), fp64 for fp64.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
        angles.append(positions[:, axis, None] * theta**-exponents)
    joined = torch.cat(angles, dim=-1).unsqueeze(1)
    return Rotation(joined.cos().to(dtype), joined.sin().to(dtype))

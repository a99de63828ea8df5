"""Rotary position embedding over (time, height, width), rotate-half layout (Open-Sora v2; FLUX pairs neighbours instead and is permuted at
conversion). Angles are computed in fp64 from the token positions of a context rank; text and dummy tokens stand at position 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class Rotation(NamedTuple):
    """cos and sin of the angle of each token and frequency, [S, 1, K/2]."""

    cos: Tensor
    sin: Tensor


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


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, sign: int) -> Tensor:
    """Rotate the pairs (i, i + K/2) by sign x angle, computed in the dtype of cos, returned in the dtype of x."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x, dtype=cos.dtype, memory_format=torch.contiguous_format)
    a, b = x[..., :half], x[..., half:]
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out[..., half:]).addcmul_(a, sin, value=sign)
    return out.to(x.dtype)


class _Rotate(torch.autograd.Function):
    """Rotation; the backward rotates by the negative angle, so only the tables are kept."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, sign=1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        return _rotate(grad, cos, sin, sign=-1), None, None


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate queries or keys [S, heads, K] by their tokens' angles."""
    result: Tensor = _Rotate.apply(x, rotation.cos, rotation.sin)  # type: ignore[no-untyped-call]
    return result

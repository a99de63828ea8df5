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


class _NormRotate(torch.autograd.Function):
    """RMSNorm over the head size with a learned scale, then the rotation, in one pass over the tensor.

    With u = x / rms(x) and pairs (a, b) = (i, i + K/2): out_a = u_a w_a cos - u_b w_b sin, out_b = u_b w_b cos + u_a w_a sin; the scale is
    folded into the small tables. Everything is computed in the tables' dtype.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        half = x.shape[-1] // 2
        rstd = torch.rsqrt(x.to(cos.dtype).square().mean(-1, keepdim=True) + eps)
        w_a, w_b = weight.to(cos.dtype).split(half)
        a, b = x[..., :half], x[..., half:]
        out = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
        torch.mul(a, cos * w_a, out=out[..., :half]).addcmul_(b, sin * w_b, value=-1)
        torch.mul(b, cos * w_b, out=out[..., half:]).addcmul_(a, sin * w_a)
        ctx.save_for_backward(x, weight, rstd, cos, sin)
        return out.mul_(rstd).to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        x, weight, rstd, cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        half = x.shape[-1] // 2
        g_a, g_b = grad[..., :half], grad[..., half:]
        rotated = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
        torch.mul(g_a, cos, out=rotated[..., :half]).addcmul_(g_b, sin)
        torch.mul(g_b, cos, out=rotated[..., half:]).addcmul_(g_a, sin, value=-1)
        unit = x * rstd
        product = rotated * unit
        scale = weight.to(cos.dtype)
        grad_weight = product.sum((0, 1))
        mean = (product @ scale).unsqueeze(-1) / x.shape[-1]
        grad_x = rotated.mul_(scale).addcmul_(unit, mean, value=-1).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None, None


def norm_rotate(x: Tensor, *, weight: Tensor, rotation: Rotation, eps: float) -> Tensor:
    """RMSNorm with scale [K], then rotation by the tokens' angles; queries or keys [S, heads, K]."""
    result: Tensor = _NormRotate.apply(x, weight, rotation.cos, rotation.sin, eps)  # type: ignore[no-untyped-call]
    return result

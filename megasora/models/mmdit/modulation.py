"""Per-sample modulation of tokens without ever keeping a [tokens, hidden] tensor of shifts, scales or gates.

Both functions keep the [samples, hidden] rows and the sample of each token; their backwards are segment sums written as a product with a
one-hot matrix, which is deterministic (index_add on CUDA is not) and accumulates in fp32 or better.
Shape letters: s tokens of a share, n samples of the pack, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megasora.parallel.pack import Runs


def _per_token(rows: Tensor, runs: Runs) -> Tensor:
    """[n, H] -> something that broadcasts against [s, H]."""
    return rows if runs.num_samples == 1 else rows.index_select(0, runs.index)


def _segment_sum(values: Tensor, runs: Runs) -> Tensor:
    """[s, H] -> [n, H], summed over each sample's tokens in fp32 (fp64 stays fp64), returned in the dtype of `values`."""
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    if runs.num_samples == 1:
        return values.sum(0, keepdim=True, dtype=wide).to(values.dtype)
    return (runs.one_hot.to(values.dtype) @ values).to(values.dtype)


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, shift: Tensor, scale: Tensor, runs: Runs, eps: float) -> Tensor:  # type: ignore[override]
        normed, mean, rstd = torch.native_layer_norm(x, (x.shape[-1],), None, None, eps)
        ctx.save_for_backward(x, mean, rstd, scale)
        ctx.runs = runs  # type: ignore[attr-defined]
        return torch.addcmul(_per_token(shift, runs), normed, _per_token(1 + scale, runs))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        x, mean, rstd, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        runs = ctx.runs  # type: ignore[attr-defined]
        normed = torch.addcmul(-mean * rstd, x.to(mean.dtype), rstd).to(grad.dtype)
        grad_scale = _segment_sum(grad * normed, runs)
        grad_shift = _segment_sum(grad, runs)
        grad_normed = grad * _per_token(1 + scale, runs)
        grad_x = torch.ops.aten.native_layer_norm_backward(grad_normed, x, [x.shape[-1]], mean, rstd, None, None, [True, False, False])[0]
        return grad_x, grad_shift, grad_scale, None, None


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, residual: Tensor, gate: Tensor, branch: Tensor, runs: Runs) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, branch)
        ctx.runs = runs  # type: ignore[attr-defined]
        return torch.addcmul(residual, _per_token(gate, runs), branch)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        gate, branch = ctx.saved_tensors  # type: ignore[attr-defined]
        runs = ctx.runs  # type: ignore[attr-defined]
        return grad, _segment_sum(grad * branch, runs), grad * _per_token(gate, runs), None


def norm_modulate(x: Tensor, *, shift: Tensor, scale: Tensor, runs: Runs, eps: float) -> Tensor:
    """LayerNorm without affine, then x (1 + scale) + shift with each token's sample's rows.

    Args:
        x: [s, H].
        shift, scale: [n, H].
        runs: sample of each token.
        eps: LayerNorm epsilon.
    """
    result: Tensor = _NormModulate.apply(x, shift, scale, runs, eps)  # type: ignore[no-untyped-call]
    return result


def gated_residual(residual: Tensor, *, gate: Tensor, branch: Tensor, runs: Runs) -> Tensor:
    """residual + gate x branch with each token's sample's gate; [s, H], gate [n, H]."""
    result: Tensor = _GatedResidual.apply(residual, gate, branch, runs)  # type: ignore[no-untyped-call]
    return result

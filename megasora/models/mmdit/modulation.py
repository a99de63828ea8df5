"""Per-sample modulation of tokens without ever keeping a [tokens, hidden] tensor of shifts, scales or gates.

The functions keep the [samples, hidden] rows and the sample of each token. A residual passes *through* a modulated norm: what uses the
tokens beside it takes them from there, so that both gradients meet inside the norm's backward and not in a sum of their own.
Shape letters: s tokens of a share, n samples of the pack, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable

from megasora.models.mmdit.kernels.contract import Kernels
from megasora.parallel.pack import Runs


class _NormModulate(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx, x: Tensor, shift: Tensor, scale: Tensor, runs: Runs, eps: float, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        normed = kernels.norm_modulate(x, shift=shift, scale=scale, runs=runs, eps=eps)
        ctx.save_for_backward(x, normed.mean, normed.rstd, scale)
        ctx.runs, ctx.kernels = runs, kernels  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return x.view_as(x), normed.out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, passed: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:  # nobody used the norm
            return passed, None, None, None, None, None
        x, mean, rstd, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        grads = ctx.kernels.norm_modulate_backward(  # type: ignore[attr-defined]
            grad,
            passed=passed,
            x=x,
            mean=mean,
            rstd=rstd,
            scale=scale,
            runs=ctx.runs,  # type: ignore[attr-defined]
        )
        return grads.x, grads.shift, grads.scale, None, None, None


class _GatedNormModulate(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx,
        residual: Tensor,
        gate: Tensor,
        branch: Tensor,
        shift: Tensor,
        scale: Tensor,
        runs: Runs,
        eps: float,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor]:
        tokens, normed = kernels.gated_norm_modulate(residual, gate=gate, branch=branch, shift=shift, scale=scale, runs=runs, eps=eps)
        ctx.save_for_backward(tokens, branch, normed.mean, normed.rstd, gate, scale)
        ctx.runs, ctx.kernels = runs, kernels  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return tokens, normed.out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, passed: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tokens, branch, mean, rstd, gate, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        if grad is None:  # nobody used the norm
            grad = torch.zeros_like(tokens)
        normed, gated = ctx.kernels.gated_norm_modulate_backward(  # type: ignore[attr-defined]
            grad,
            passed=passed,
            tokens=tokens,
            branch=branch,
            mean=mean,
            rstd=rstd,
            gate=gate,
            scale=scale,
            runs=ctx.runs,  # type: ignore[attr-defined]
        )
        return normed.x, gated.gate, gated.branch, normed.shift, normed.scale, None, None, None


class _GatedResidual(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx, residual: Tensor, gate: Tensor, branch: Tensor, runs: Runs, kernels: Kernels
    ) -> Tensor:
        ctx.save_for_backward(gate, branch)
        ctx.runs, ctx.kernels = runs, kernels  # type: ignore[attr-defined]
        return kernels.gated_residual(residual, gate=gate, branch=branch, runs=runs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, branch = ctx.saved_tensors  # type: ignore[attr-defined]
        grads = ctx.kernels.gated_residual_backward(grad, gate=gate, branch=branch, runs=ctx.runs)  # type: ignore[attr-defined]
        return grad, grads.gate, grads.branch, None, None


def norm_modulate(x: Tensor, *, shift: Tensor, scale: Tensor, runs: Runs, eps: float, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """x itself, for whoever adds to it, and its LayerNorm without affine, x (1 + scale) + shift with each token's sample's rows.

    Args:
        x: [s, H].
        shift, scale: [n, H].
        runs: sample of each token.
        eps: LayerNorm epsilon.
        kernels: who computes it.
    """
    result: tuple[Tensor, Tensor] = _NormModulate.apply(x, shift, scale, runs, eps, kernels)  # type: ignore[no-untyped-call]
    return result


def gated_residual(residual: Tensor, *, gate: Tensor, branch: Tensor, runs: Runs, kernels: Kernels) -> Tensor:
    """residual + gate x branch with each token's sample's gate; [s, H], gate [n, H]."""
    result: Tensor = _GatedResidual.apply(residual, gate, branch, runs, kernels)  # type: ignore[no-untyped-call]
    return result


def gated_norm_modulate(
    residual: Tensor, *, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, runs: Runs, eps: float, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """`gated_residual`, then `norm_modulate` of its result: (tokens, modulated norm)."""
    arguments = (residual, gate, branch, shift, scale, runs, eps, kernels)
    result: tuple[Tensor, Tensor] = _GatedNormModulate.apply(*arguments)  # type: ignore[no-untyped-call]
    return result

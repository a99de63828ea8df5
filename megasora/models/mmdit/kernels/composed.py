"""The contract in torch's own operations: any device, any dtype. The reference of the other implementations, and what a CPU runs.

A modulated norm is torch's LayerNorm with the sample's rows as its affine weights, sample by sample: one pass forward and one backward,
which sums the gradients of shift and scale on its way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasora.models.mmdit.kernels.contract import GatedGrads, Normed, NormedGrads
from megasora.parallel.pack import Rows, Runs

_ATEN = torch.ops.aten


class ComposedKernels:
    """See `contract.Kernels`."""

    def norm_modulate(self, x: Tensor, *, shift: Tensor, scale: Tensor, runs: Runs, eps: float) -> Normed:
        """See the contract."""
        weight, shift = 1 + _affine(scale, x), _affine(shift, x)
        if runs.num_samples == 1:
            return Normed(*torch.native_layer_norm(x, (x.shape[-1],), weight[0], shift[0], eps))
        parts = [
            torch.native_layer_norm(x[start:stop], (x.shape[-1],), weight[sample], shift[sample], eps)
            for start, stop, sample in runs.bounds
        ]
        return Normed(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))

    def norm_modulate_backward(
        self, grad: Tensor, *, passed: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, runs: Runs
    ) -> NormedGrads:
        """See the contract."""
        weight = 1 + _affine(scale, x)
        if runs.num_samples == 1:
            grad_x, of_scale, of_shift = _norm_backward(grad, x, mean, rstd, weight[0])
            grad_x = grad_x if passed is None else grad_x.add_(passed)
            return NormedGrads(grad_x, of_shift[None].to(scale.dtype), of_scale[None].to(scale.dtype))
        grad_x = torch.empty_like(x)
        sums = torch.zeros(2, *scale.shape, dtype=_wide(x), device=x.device)
        for start, stop, sample in runs.bounds:
            part = slice(start, stop)
            piece, of_scale, of_shift = _norm_backward(grad[part], x[part], mean[part], rstd[part], weight[sample])
            torch.add(piece, 0 if passed is None else passed[part], out=grad_x[part])
            sums[0, sample] += of_shift
            sums[1, sample] += of_scale
        shift_sum, scale_sum = sums.to(scale.dtype)
        return NormedGrads(grad_x, shift_sum, scale_sum)

    def gated_residual(self, residual: Tensor, *, gate: Tensor, branch: Tensor, runs: Runs) -> Tensor:
        """See the contract."""
        return torch.addcmul(residual, _per_token(gate, runs), branch)

    def gated_residual_backward(self, grad: Tensor, *, gate: Tensor, branch: Tensor, runs: Runs) -> GatedGrads:
        """See the contract."""
        return GatedGrads(_sample_sums(grad * branch, runs), grad * _per_token(gate, runs))

    def gated_norm_modulate(
        self, residual: Tensor, *, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, runs: Runs, eps: float
    ) -> tuple[Tensor, Normed]:
        """See the contract."""
        tokens = self.gated_residual(residual, gate=gate, branch=branch, runs=runs)
        return tokens, self.norm_modulate(tokens, shift=shift, scale=scale, runs=runs, eps=eps)

    def gated_norm_modulate_backward(
        self,
        grad: Tensor,
        *,
        passed: Tensor | None,
        tokens: Tensor,
        branch: Tensor,
        mean: Tensor,
        rstd: Tensor,
        gate: Tensor,
        scale: Tensor,
        runs: Runs,
    ) -> tuple[NormedGrads, GatedGrads]:
        """See the contract."""
        normed = self.norm_modulate_backward(grad, passed=passed, x=tokens, mean=mean, rstd=rstd, scale=scale, runs=runs)
        return normed, self.gated_residual_backward(normed.x, gate=gate, branch=branch, runs=runs)

    def place_heads(
        self,
        qkv: Tensor,
        *,
        weights: tuple[Tensor, Tensor],
        cos: Tensor,
        sin: Tensor,
        rows: Rows,
        eps: float,
        out: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """See the contract."""
        for number, weight in enumerate(weights):
            target = _in_place(out[number], rows, dtype=cos.dtype)
            turned = _norm_rotate(qkv[:, number], weight, cos, sin, eps, out=target)
            if target is None:
                _scatter(turned, rows, out=out[number])
        _scatter(qkv[:, 2], rows, out=out[2])

    def place_heads_backward(
        self,
        grads: tuple[Tensor, Tensor, Tensor],
        *,
        qkv: Tensor,
        weights: tuple[Tensor, Tensor],
        cos: Tensor,
        sin: Tensor,
        rows: Rows,
        eps: float,
        out: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See the contract."""
        of_q, of_k = (
            _norm_rotate_backward(_gather(grads[number], rows), qkv[:, number], weight, cos, sin, eps, out=out[:, number])
            for number, weight in enumerate(weights)
        )
        out[:, 2] = _gather(grads[2], rows)
        return of_q, of_k

    def collect_heads(self, attended: Tensor, *, mlp: Tensor | None, rows: Rows) -> Tensor:
        """See the contract."""
        heads = _gather(attended, rows).flatten(1)
        if mlp is None:
            return heads
        width = heads.shape[1]
        out = torch.empty(heads.shape[0], width + mlp.shape[1], dtype=mlp.dtype, device=mlp.device)
        out[:, :width] = heads
        _ATEN.gelu.out(mlp, approximate="tanh", out=out[:, width:])
        return out

    def collect_heads_backward(self, grad: Tensor, *, mlp: Tensor | None, rows: Rows, attended_out: Tensor, mlp_out: Tensor | None) -> None:
        """See the contract."""
        width = attended_out.shape[0] * attended_out.shape[2] * attended_out.shape[3]
        _scatter(grad[:, :width].unflatten(1, (-1, attended_out.shape[3])), rows, out=attended_out)
        if mlp is not None:
            _ATEN.gelu_backward.grad_input(grad[:, width:], mlp, approximate="tanh", grad_input=mlp_out)


COMPOSED = ComposedKernels()
"""It has no state."""


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _affine(rows: Tensor, x: Tensor) -> Tensor:
    """Rows in the dtype that torch's LayerNorm takes beside x; on a CPU that is fp32, and then its statistics are too."""
    return rows.to(_wide(x)) if x.device.type == "cpu" else rows


def _norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts = _ATEN.native_layer_norm_backward(grad, x, [x.shape[-1]], mean, rstd, weight, weight, [True, True, True])
    return parts[0], parts[1], parts[2]


def _per_token(rows: Tensor, runs: Runs) -> Tensor:
    """[n, H] -> something that broadcasts against [s, H]."""
    return rows if runs.num_samples == 1 else rows.index_select(0, runs.index)


def _sample_sums(values: Tensor, runs: Runs) -> Tensor:
    """[s, H] -> [n, H], summed over each sample's tokens; a product with a one-hot matrix is deterministic (index_add on CUDA is not)."""
    if runs.num_samples == 1:
        return values.sum(0, keepdim=True, dtype=_wide(values)).to(values.dtype)
    return (runs.one_hot.to(values.dtype) @ values).to(values.dtype)


def _in_place(out: Tensor, rows: Rows, *, dtype: torch.dtype) -> Tensor | None:
    """The rows of `out` as [s, h, K] where they can be written directly."""
    if out.shape[0] > 1 or rows.index is not None or out.dtype != dtype:
        return None
    return out[0].narrow(0, rows.start, rows.count)


def _scatter(values: Tensor, rows: Rows, *, out: Tensor) -> None:
    """[s, h, K] -> its rows of [G, N, h / G, K]."""
    by_group = values.unflatten(1, (out.shape[0], -1)).transpose(0, 1)
    if rows.index is None:
        out.narrow(1, rows.start, rows.count).copy_(by_group)
    else:
        out.index_copy_(1, rows.index, by_group.to(out.dtype))


def _gather(values: Tensor, rows: Rows) -> Tensor:
    """The rows of [G, N, h / G, K] as [s, h, K]."""
    part = values.narrow(1, rows.start, rows.count) if rows.index is None else values.index_select(1, rows.index)
    return part.transpose(0, 1).flatten(1, 2)


def _norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, *, out: Tensor | None) -> Tensor:
    """RMSNorm over K with a scale, then the rotation, computed in the tables' dtype.

    With u = x / rms(x) and pairs (a, b) = (i, i + K/2): out_a = u_a w_a cos - u_b w_b sin, out_b = u_b w_b cos + u_a w_a sin; the scale is
    folded into the small tables.
    """
    half = x.shape[-1] // 2
    rstd = torch.rsqrt(x.to(cos.dtype).square().mean(-1, keepdim=True) + eps)
    w_a, w_b = weight.to(cos.dtype).split(half)
    a, b = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=cos.dtype, device=x.device) if out is None else out
    torch.mul(a, cos * w_a, out=out[..., :half]).addcmul_(b, sin * w_b, value=-1)
    torch.mul(b, cos * w_b, out=out[..., half:]).addcmul_(a, sin * w_a)
    return out.mul_(rstd)


def _norm_rotate_backward(grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, *, out: Tensor) -> Tensor:
    """Writes the gradient of x into `out`, returns the scale's."""
    half = x.shape[-1] // 2
    rstd = torch.rsqrt(x.to(cos.dtype).square().mean(-1, keepdim=True) + eps)
    g_a, g_b = grad[..., :half], grad[..., half:]
    rotated = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    torch.mul(g_a, cos, out=rotated[..., :half]).addcmul_(g_b, sin)
    torch.mul(g_b, cos, out=rotated[..., half:]).addcmul_(g_a, sin, value=-1)
    unit = x * rstd
    product = rotated * unit
    scale = weight.to(cos.dtype)
    mean = (product @ scale).unsqueeze(-1) / x.shape[-1]
    out.copy_(rotated.mul_(scale).addcmul_(unit, mean, value=-1).mul_(rstd))
    return product.sum((0, 1)).to(weight.dtype)

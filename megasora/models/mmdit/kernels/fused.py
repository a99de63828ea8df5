"""The contract on Triton kernels: bf16 and fp32 on CUDA, each operation one pass over its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from megasora.models.mmdit.kernels.contract import GatedGrads, Normed, NormedGrads
from megasora.models.mmdit.kernels.operators import OPERATORS, num_programs
from megasora.parallel.pack import Rows, Runs


class FusedKernels:
    """See `contract.Kernels`."""

    def norm_modulate(self, x: Tensor, *, shift: Tensor, scale: Tensor, runs: Runs, eps: float) -> Normed:
        """See the contract."""
        x = x.contiguous()
        normed = _empty_normed(x)
        OPERATORS["norm_modulate"](x, shift.contiguous(), scale.contiguous(), runs.tiles, eps, *normed)
        return normed

    def norm_modulate_backward(
        self, grad: Tensor, *, passed: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, runs: Runs
    ) -> NormedGrads:
        """See the contract."""
        grad_x, sums = torch.empty(x.shape, dtype=x.dtype, device=x.device), _empty_sums(2, x, runs)
        OPERATORS["norm_modulate_backward"](
            grad.contiguous(),
            None if passed is None else passed.contiguous(),
            x.contiguous(),
            mean,
            rstd,
            scale.contiguous(),
            runs.tiles,
            grad_x,
            sums,
        )
        of_shift, of_scale = _tile_sums(sums, runs, dtype=scale.dtype)
        return NormedGrads(grad_x, of_shift, of_scale)

    def gated_residual(self, residual: Tensor, *, gate: Tensor, branch: Tensor, runs: Runs) -> Tensor:
        """See the contract."""
        residual = residual.contiguous()
        out = torch.empty_like(residual)
        OPERATORS["gated_residual"](residual, gate.contiguous(), branch.contiguous(), runs.tiles, out)
        return out

    def gated_residual_backward(self, grad: Tensor, *, gate: Tensor, branch: Tensor, runs: Runs) -> GatedGrads:
        """See the contract."""
        grad = grad.contiguous()
        grad_branch, sums = torch.empty_like(grad), _empty_sums(1, grad, runs)
        OPERATORS["gated_residual_backward"](grad, gate.contiguous(), branch.contiguous(), runs.tiles, grad_branch, sums)
        (of_gate,) = _tile_sums(sums, runs, dtype=gate.dtype)
        return GatedGrads(of_gate, grad_branch)

    def gated_norm_modulate(
        self, residual: Tensor, *, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, runs: Runs, eps: float
    ) -> tuple[Tensor, Normed]:
        """See the contract."""
        residual = residual.contiguous()
        tokens, normed = torch.empty_like(residual), _empty_normed(residual)
        rows = (shift.contiguous(), scale.contiguous())
        OPERATORS["gated_norm_modulate"](residual, gate.contiguous(), branch.contiguous(), *rows, runs.tiles, eps, tokens, *normed)
        return tokens, normed

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
        grad_residual, grad_branch, sums = torch.empty_like(tokens), torch.empty_like(tokens), _empty_sums(3, tokens, runs)
        OPERATORS["gated_norm_modulate_backward"](
            grad.contiguous(),
            None if passed is None else passed.contiguous(),
            tokens,
            branch.contiguous(),
            mean,
            rstd,
            gate.contiguous(),
            scale.contiguous(),
            runs.tiles,
            grad_residual,
            grad_branch,
            sums,
        )
        of_shift, of_scale, of_gate = _tile_sums(sums, runs, dtype=scale.dtype)
        return NormedGrads(grad_residual, of_shift, of_scale), GatedGrads(of_gate, grad_branch)

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
        OPERATORS["place_heads"](_rows_apart(qkv), *weights, cos.contiguous(), sin.contiguous(), *_address(rows), eps, *out)

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
        qkv = _rows_apart(qkv)
        sums = torch.empty(num_programs(qkv), 2, qkv.shape[3], dtype=torch.float32, device=qkv.device)
        OPERATORS["place_heads_backward"](
            *grads, qkv, *weights, cos.contiguous(), sin.contiguous(), *_address(rows), eps, _rows_apart(out), sums
        )
        of_q, of_k = sums.sum(0).to(weights[0].dtype)
        return of_q, of_k

    def collect_heads(self, attended: Tensor, *, mlp: Tensor | None, rows: Rows) -> Tensor:
        """See the contract."""
        attended = attended.contiguous()
        if mlp is None and rows.index is None and attended.shape[0] == 1:
            return attended[0].narrow(0, rows.start, rows.count).flatten(1)
        width = attended.shape[0] * attended.shape[2] * attended.shape[3] + (0 if mlp is None else mlp.shape[1])
        out = attended.new_empty(rows.count, width)
        OPERATORS["collect_heads"](attended, mlp, *_address(rows), out)
        return out

    def collect_heads_backward(self, grad: Tensor, *, mlp: Tensor | None, rows: Rows, attended_out: Tensor, mlp_out: Tensor | None) -> None:
        """See the contract."""
        OPERATORS["collect_heads_backward"](grad.contiguous(), mlp, *_address(rows), attended_out, mlp_out)


FUSED = FusedKernels()
"""It has no state."""


def _empty_normed(x: Tensor) -> Normed:
    mean, rstd = (torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device) for _ in range(2))
    return Normed(torch.empty_like(x), mean, rstd)


def _empty_sums(number: int, x: Tensor, runs: Runs) -> Tensor:
    return torch.empty(number, len(runs.tiles), x.shape[1], dtype=torch.float32, device=x.device)


def _address(rows: Rows) -> tuple[Tensor | None, int]:
    """What a kernel adds token numbers to: it reads the index as one run of int64."""
    assert rows.index is None or (rows.index.is_contiguous() and rows.index.dtype == torch.int64), "an index is one run of int64"
    return rows.index, rows.start


def _rows_apart(qkv: Tensor) -> Tensor:
    """[s, 3, h, K] whose rows may stand apart, each of them contiguous: what the kernels address."""
    _, _, heads, head_dim = qkv.shape
    assert qkv.stride()[1:] == (heads * head_dim, head_dim, 1), f"rows of projections are contiguous, got strides {qkv.stride()}"
    return qkv


def _tile_sums(sums: Tensor, runs: Runs, *, dtype: torch.dtype) -> list[Tensor]:
    """[m, tiles, H] fp32 -> m tensors [n, H]: each sample's tiles added up in a fixed order."""
    if runs.num_samples == 1:
        return list(sums.sum(1, keepdim=True).to(dtype))
    return list((runs.tile_one_hot @ sums).to(dtype))

"""What a block computes outside matrix products and attention, without autograd (`modulation`, `heads` differentiate it).

Every operation names what it reads and writes, so that an implementation in one pass moves just those bytes. Sums over a sample's tokens
are accumulated in fp32 (fp64 for fp64) and come back in the rows' dtype; how work is spread over a device changes nothing.
Shape letters: s tokens of a stream, n samples of the pack, H hidden, h heads of this TP rank, K head size, F feed-forward width of this
rank; heads are held as [G, N, h / G, K]: G groups of heads (Ulysses ranks), N tokens in attention's order (`pack.Rows`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from megasora.parallel.pack import Rows, Runs


class Normed(NamedTuple):
    """A modulated norm and what its backward needs."""

    out: Tensor
    """[s, H], LayerNorm without affine, then x (1 + scale) + shift."""
    mean: Tensor
    """[s, 1], mean of each token, fp32 (fp64 for fp64)."""
    rstd: Tensor
    """[s, 1], 1 / sqrt(variance + eps) of each token, fp32 (fp64 for fp64)."""


class NormedGrads(NamedTuple):
    """Gradients of a modulated norm."""

    x: Tensor
    """[s, H]."""
    shift: Tensor
    """[n, H]."""
    scale: Tensor
    """[n, H]."""


class GatedGrads(NamedTuple):
    """Gradients of residual + gate x branch; the residual's is the output's."""

    gate: Tensor
    """[n, H]."""
    branch: Tensor
    """[s, H]."""


class Kernels(Protocol):
    """One implementation."""

    def norm_modulate(self, x: Tensor, *, shift: Tensor, scale: Tensor, runs: Runs, eps: float) -> Normed:
        """LayerNorm of x [s, H], then each token's sample's scale and shift [n, H]."""
        ...

    def norm_modulate_backward(
        self, grad: Tensor, *, passed: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, runs: Runs
    ) -> NormedGrads:
        """Backward of `norm_modulate`; `passed` [s, H] is the gradient of x from elsewhere, added to the result."""
        ...

    def gated_residual(self, residual: Tensor, *, gate: Tensor, branch: Tensor, runs: Runs) -> Tensor:
        """residual + gate x branch, [s, H]."""
        ...

    def gated_residual_backward(self, grad: Tensor, *, gate: Tensor, branch: Tensor, runs: Runs) -> GatedGrads:
        """Backward of `gated_residual`."""
        ...

    def gated_norm_modulate(
        self, residual: Tensor, *, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, runs: Runs, eps: float
    ) -> tuple[Tensor, Normed]:
        """`gated_residual`, and the modulated norm of its result."""
        ...

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
        """Backward of `gated_norm_modulate`: `passed` is the gradient of the gated residual's result `tokens`. The residual's is `x`."""
        ...

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
        """Queries and keys normed (RMSNorm with weights [K]) and rotated, values as they are, written where attention wants them.

        Args:
            qkv: [s, 3, h, K], rows of any stride.
            weights: of queries and keys.
            cos, sin: fp32 [s, 1, K / 2] (fp64 for fp64).
            rows: place of each token in the N of `out`.
            eps: of the RMSNorm.
            out: q, k, v, each [G, N, h / G, K], contiguous; rows of other streams are left alone.
        """
        ...

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
        """Backward of `place_heads`: writes the gradient of qkv into `out` [s, 3, h, K] (rows of any stride), returns the weights'."""
        ...

    def collect_heads(self, attended: Tensor, *, mlp: Tensor | None, rows: Rows) -> Tensor:
        """Attention's result back in the stream's order, beside the feed-forward layer's activation.

        Args:
            attended: [G, N, h / G, K], contiguous.
            mlp: [s, F] before its GELU (tanh), rows of any stride; None where there is none.
            rows: place of each token in N.

        Returns:
            [s, h K] or [s, h K + F].
        """
        ...

    def collect_heads_backward(self, grad: Tensor, *, mlp: Tensor | None, rows: Rows, attended_out: Tensor, mlp_out: Tensor | None) -> None:
        """Backward of `collect_heads`: writes the rows of `attended_out` [G, N, h / G, K] that are this stream's, and `mlp_out` [s, F]."""
        ...

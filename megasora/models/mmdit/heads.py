"""Queries, keys and values on their way into attention, and its result on its way out: norm, rotation every change of order in one pass.

`linear1` of a single block gives one tensor [s, q k v mlp]: attention takes three parts in seven, the feed-forward layer four. So that its
gradient is one tensor too, written in two parts and never joined, that tensor passes *through* `place_heads`: `collect_heads` takes it from
there, its backward makes the gradient and fills the mlp columns, and the backward of `place_heads`, which runs later and is the only one to
see it, fills the others.
Shape letters: see `kernels.contract`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable

from megasora.models.mmdit.kernels.contract import Kernels
from megasora.models.mmdit.rotary import Rotation
from megasora.parallel.pack import Rows


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """What the buffers of queries, keys and values look like."""

    num_groups: int
    """G."""
    length: int
    """N."""
    head_dim: int
    """K."""
    eps: float
    """Of the RMSNorm of queries and keys."""


@dataclass(frozen=True, kw_only=True)
class Projected:
    """One stream's projections and how they become heads."""

    tensor: Tensor
    """[s, 3 h K] or, with a feed-forward layer's part behind, [s, 3 h K + F]."""
    weights: tuple[Tensor, Tensor]
    """[K], RMSNorm scales of queries and keys."""
    rotation: Rotation
    rows: Rows


class _PlaceHeads(Function):
    """Tensors come as (projected, q weight, k weight, cos, sin) of each stream."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx, layout: HeadLayout, heads: int, rows: tuple[Rows, ...], kernels: Kernels, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        streams = _by_five(tensors)
        shape = (layout.num_groups, layout.length, heads // layout.num_groups, layout.head_dim)
        out = (tensors[0].new_empty(shape), tensors[0].new_empty(shape), tensors[0].new_empty(shape))
        for (projected, *weights, cos, sin), stream_rows in zip(streams, rows, strict=True):
            kernels.place_heads(
                _qkv(projected, heads, layout),
                weights=(weights[0], weights[1]),
                cos=cos,
                sin=sin,
                rows=stream_rows,
                eps=layout.eps,
                out=out,
            )
        ctx.save_for_backward(*tensors)
        ctx.layout, ctx.heads, ctx.rows, ctx.kernels = layout, heads, rows, kernels  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        wide = tensors[0].shape[1] > 3 * heads * layout.head_dim
        return (*out, tensors[0].view_as(tensors[0])) if wide else out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        layout, heads = ctx.layout, ctx.heads  # type: ignore[attr-defined]
        placed = (grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous())
        result: list[Tensor | None] = []
        for (projected, *weights, cos, sin), rows in zip(_by_five(ctx.saved_tensors), ctx.rows, strict=True):  # type: ignore[attr-defined]
            grad = grads[3] if len(grads) == 4 else torch.empty_like(projected)
            of_weights = ctx.kernels.place_heads_backward(  # type: ignore[attr-defined]
                placed,
                qkv=_qkv(projected, heads, layout),
                weights=(weights[0], weights[1]),
                cos=cos,
                sin=sin,
                rows=rows,
                eps=layout.eps,
                out=_qkv(grad, heads, layout),
            )
            result += [grad, *of_weights, None, None]
        return (None, None, None, None, *result)


class _CollectHeads(Function):
    """`wide` is what passed through `_PlaceHeads`, or None."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx, attended: Tensor, wide: Tensor | None, rows: tuple[Rows, ...], kernels: Kernels
    ) -> tuple[Tensor, ...]:
        ctx.shape, ctx.rows, ctx.kernels = attended.shape, rows, kernels  # type: ignore[attr-defined]
        ctx.save_for_backward(*([] if wide is None else [wide]))
        return tuple(kernels.collect_heads(attended, mlp=_mlp(wide, attended.shape), rows=stream) for stream in rows)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wide = ctx.saved_tensors[0] if ctx.saved_tensors else None  # type: ignore[attr-defined]
        shape = ctx.shape  # type: ignore[attr-defined]
        grad_attended = grads[0].new_empty(shape)
        grad_wide = None if wide is None else torch.empty_like(wide)
        for grad, rows in zip(grads, ctx.rows, strict=True):  # type: ignore[attr-defined]
            ctx.kernels.collect_heads_backward(  # type: ignore[attr-defined]
                grad, mlp=_mlp(wide, shape), rows=rows, attended_out=grad_attended, mlp_out=_mlp(grad_wide, shape)
            )
        return grad_attended, grad_wide, None, None


def _by_five(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    return [tuple(tensors[start : start + 5]) for start in range(0, len(tensors), 5)]


def _qkv(projected: Tensor, heads: int, layout: HeadLayout) -> Tensor:
    """[s, 3, h, K], a view."""
    return projected[:, : 3 * heads * layout.head_dim].unflatten(1, (3, heads, layout.head_dim))


def _mlp(wide: Tensor | None, shape: torch.Size) -> Tensor | None:
    """[s, F], a view of what stands behind q, k and v."""
    return None if wide is None else wide[:, 3 * shape[0] * shape[2] * shape[3] :]


def place_heads(streams: Sequence[Projected], *, heads: int, layout: HeadLayout, kernels: Kernels) -> tuple[Tensor, ...]:
    """Queries and keys normed and rotated, values as they are, all streams in attention's order.

    Args:
        streams: whose rows together are all N.
        heads: h, heads of this TP rank.
        layout: of the result.
        kernels: who computes it.

    Returns:
        q, k, v, each [G, N, h / G, K]; a single stream with a feed-forward layer's part comes fourth, for `collect_heads` and nobody else.
    """
    tensors = [tensor for stream in streams for tensor in (stream.tensor, *stream.weights, *stream.rotation)]
    arguments = (layout, heads, tuple(stream.rows for stream in streams), kernels, *tensors)
    result: tuple[Tensor, ...] = _PlaceHeads.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def collect_heads(attended: Tensor, *, rows: Sequence[Rows], kernels: Kernels, wide: Tensor | None = None) -> tuple[Tensor, ...]:
    """Attention's result for each stream, [s, h K]; with `wide` (what came fourth) the feed-forward part follows, after its GELU."""
    result: tuple[Tensor, ...] = _CollectHeads.apply(attended, wide, tuple(rows), kernels)  # type: ignore[no-untyped-call]
    return result

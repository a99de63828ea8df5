"""Triton kernels between projections and attention: norm, rotation, GELU and the change of order, each tensor read once and written once.

A program of `place` holds (token, head) pairs with both halves of the head, one of `collect` a stretch of columns of some tokens.
The functions at the end launch them; `operators` makes operations of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megasora.models.mmdit.kernels.operators import PAIRS, num_programs

ROWS, COLUMNS = 4, 1024
"""Tokens and columns of a program of `collect`."""


@triton.jit
def _normed(a, b, weight_a, weight_b, size, eps):
    scaling = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / size + eps)[:, None]
    return a * scaling, b * scaling, scaling


@triton.jit
def _place_half(source, target, weight, cos, sin, from_, to, column, inside, half, eps, HALF: tl.constexpr):
    a = tl.load(source + from_, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + from_ + half, mask=inside, other=0.0).to(tl.float32)
    in_row = column < half
    weight_a = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
    weight_b = tl.load(weight + half + column, mask=in_row, other=0.0).to(tl.float32)
    a, b, _ = _normed(a, b, weight_a, weight_b, 2 * half, eps)
    a, b = a * weight_a, b * weight_b
    tl.store(target + to, (a * cos - b * sin).to(target.dtype.element_ty), mask=inside)
    tl.store(target + to + half, (b * cos + a * sin).to(target.dtype.element_ty), mask=inside)


@triton.jit
def _places(rows, start, pair, real, column, half, heads, width, groups, length, INDEXED: tl.constexpr):
    """Offsets of the pairs' first half: in the projections (queries) and in [G, N, h / G, K]; token numbers."""
    token, head = pair // heads, pair % heads
    if INDEXED:
        row = tl.load(rows + token, mask=real, other=0)
    else:
        row = token.to(tl.int64) + start
    per_group = heads // groups
    group, own = head // per_group, head % per_group
    size = 2 * half
    to = ((group.to(tl.int64) * length + row) * per_group + own) * size
    from_ = token.to(tl.int64) * width + head * size
    return from_[:, None] + column[None, :], to[:, None] + column[None, :], token


@triton.jit
def _place(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    rows,
    q,
    k,
    v,
    num_tokens,
    heads,
    width,
    groups,
    length,
    start,
    half,
    eps,
    INDEXED: tl.constexpr,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
):
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    column = tl.arange(0, HALF)
    real = pair < num_tokens * heads
    inside = real[:, None] & (column < half)[None, :]
    from_, to, token = _places(rows, start, pair, real, column, half, heads, width, groups, length, INDEXED)
    angle = token[:, None] * half + column[None, :]
    cosine = tl.load(cos + angle, mask=inside, other=0.0)
    sine = tl.load(sin + angle, mask=inside, other=0.0)
    part = heads * 2 * half
    _place_half(qkv, q, q_weight, cosine, sine, from_, to, column, inside, half, eps, HALF)
    _place_half(qkv + part, k, k_weight, cosine, sine, from_, to, column, inside, half, eps, HALF)
    tl.store(v + to, tl.load(qkv + 2 * part + from_, mask=inside, other=0.0), mask=inside)
    tl.store(v + to + half, tl.load(qkv + 2 * part + from_ + half, mask=inside, other=0.0), mask=inside)


@triton.jit
def _place_half_backward(source, grad, target, weight, sums, cos, sin, from_, from_grad, to, column, inside, half, eps, HALF: tl.constexpr):
    in_row = column < half
    weight_a = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
    weight_b = tl.load(weight + half + column, mask=in_row, other=0.0).to(tl.float32)
    a = tl.load(source + from_, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + from_ + half, mask=inside, other=0.0).to(tl.float32)
    unit_a, unit_b, scaling = _normed(a, b, weight_a, weight_b, 2 * half, eps)
    grad_a = tl.load(grad + from_grad, mask=inside, other=0.0).to(tl.float32)
    grad_b = tl.load(grad + from_grad + half, mask=inside, other=0.0).to(tl.float32)
    turned_a, turned_b = grad_a * cos + grad_b * sin, grad_b * cos - grad_a * sin
    tl.store(sums + column, tl.sum(turned_a * unit_a, axis=0), mask=in_row)
    tl.store(sums + half + column, tl.sum(turned_b * unit_b, axis=0), mask=in_row)
    turned_a, turned_b = turned_a * weight_a, turned_b * weight_b
    along = (tl.sum(turned_a * unit_a, axis=1) + tl.sum(turned_b * unit_b, axis=1))[:, None] / (2 * half)
    tl.store(target + to, ((turned_a - unit_a * along) * scaling).to(target.dtype.element_ty), mask=inside)
    tl.store(target + to + half, ((turned_b - unit_b * along) * scaling).to(target.dtype.element_ty), mask=inside)


@triton.jit
def _place_backward(
    q,
    k,
    v,
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    rows,
    out,
    sums,
    num_tokens,
    heads,
    width,
    out_width,
    groups,
    length,
    start,
    half,
    eps,
    INDEXED: tl.constexpr,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
):
    program = tl.program_id(0)
    pair = program * PAIRS + tl.arange(0, PAIRS)
    column = tl.arange(0, HALF)
    real = pair < num_tokens * heads
    inside = real[:, None] & (column < half)[None, :]
    from_, placed, token = _places(rows, start, pair, real, column, half, heads, width, groups, length, INDEXED)
    angle = token[:, None] * half + column[None, :]
    cosine = tl.load(cos + angle, mask=inside, other=0.0)
    sine = tl.load(sin + angle, mask=inside, other=0.0)
    to = from_ + token.to(tl.int64)[:, None] * (out_width - width)
    part = heads * 2 * half
    own = sums + program.to(tl.int64) * 4 * half
    _place_half_backward(qkv, q, out, q_weight, own, cosine, sine, from_, placed, to, column, inside, half, eps, HALF)
    _place_half_backward(
        qkv + part, k, out + part, k_weight, own + 2 * half, cosine, sine, from_, placed, to, column, inside, half, eps, HALF
    )
    tl.store(out + 2 * part + to, tl.load(v + placed, mask=inside, other=0.0), mask=inside)
    tl.store(out + 2 * part + to + half, tl.load(v + placed + half, mask=inside, other=0.0), mask=inside)


@triton.jit
def _gelu_gate(x):
    """(sigmoid of twice the tanh's argument, derivative of that argument doubled): gelu(x) = x sigmoid(2 u) for the tanh form."""
    inner = 2 * 0.7978845608028654 * (x + 0.044715 * x * x * x)
    slope = 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
    return tl.sigmoid(inner), slope


@triton.jit
def _attended_places(rows, start, token, real, column, head_size, per_group, length, INDEXED: tl.constexpr):
    """Offsets in [G, N, h / G, K] of columns of h K."""
    if INDEXED:
        row = tl.load(rows + token, mask=real, other=0)
    else:
        row = token.to(tl.int64) + start
    width = per_group * head_size
    group, own = column // width, column % width
    return (group.to(tl.int64)[None, :] * length + row[:, None]) * width + own[None, :]


@triton.jit
def _collect(
    attended,
    mlp,
    rows,
    out,
    num_tokens,
    heads_width,
    mlp_width,
    mlp_stride,
    head_size,
    per_group,
    length,
    start,
    INDEXED: tl.constexpr,
    MLP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = token < num_tokens
    total = heads_width + mlp_width
    from_heads = real[:, None] & (column < heads_width)[None, :]
    place = _attended_places(rows, start, token, real, column, head_size, per_group, length, INDEXED)
    to = token.to(tl.int64)[:, None] * total + column[None, :]
    tl.store(out + to, tl.load(attended + place, mask=from_heads, other=0.0), mask=from_heads)
    if MLP:
        from_mlp = real[:, None] & ((column >= heads_width) & (column < total))[None, :]
        x = tl.load(mlp + token.to(tl.int64)[:, None] * mlp_stride + (column - heads_width)[None, :], mask=from_mlp, other=0.0)
        x = x.to(tl.float32)
        gate, _ = _gelu_gate(x)
        tl.store(out + to, (x * gate).to(out.dtype.element_ty), mask=from_mlp)


@triton.jit
def _collect_backward(
    grad,
    mlp,
    rows,
    attended_out,
    mlp_out,
    num_tokens,
    heads_width,
    mlp_width,
    mlp_stride,
    out_stride,
    head_size,
    per_group,
    length,
    start,
    INDEXED: tl.constexpr,
    MLP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = token < num_tokens
    total = heads_width + mlp_width
    to_heads = real[:, None] & (column < heads_width)[None, :]
    place = _attended_places(rows, start, token, real, column, head_size, per_group, length, INDEXED)
    from_ = token.to(tl.int64)[:, None] * total + column[None, :]
    tl.store(attended_out + place, tl.load(grad + from_, mask=to_heads, other=0.0), mask=to_heads)
    if MLP:
        to_mlp = real[:, None] & ((column >= heads_width) & (column < total))[None, :]
        own = (column - heads_width)[None, :]
        x = tl.load(mlp + token.to(tl.int64)[:, None] * mlp_stride + own, mask=to_mlp, other=0.0).to(tl.float32)
        upstream = tl.load(grad + from_, mask=to_mlp, other=0.0).to(tl.float32)
        gate, slope = _gelu_gate(x)
        result = upstream * gate * (1 + x * (1 - gate) * slope)
        tl.store(mlp_out + token.to(tl.int64)[:, None] * out_stride + own, result.to(mlp_out.dtype.element_ty), mask=to_mlp)


def _half_block(head_dim: int) -> int:
    block: int = triton.next_power_of_2(head_dim // 2)
    return block


def place_heads(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor | None,
    start: int,
    eps: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> None:
    """Norm, rotate and place [s, 3, h, K] in q, k, v [G, N, h / G, K]."""
    tokens, _, heads, head_dim = qkv.shape
    _place[(num_programs(qkv),)](
        qkv,
        q_weight,
        k_weight,
        cos,
        sin,
        qkv if index is None else index,
        q,
        k,
        v,
        tokens,
        heads,
        qkv.stride(0),
        q.shape[0],
        q.shape[1],
        start,
        head_dim // 2,
        eps,
        INDEXED=index is not None,
        PAIRS=PAIRS,
        HALF=_half_block(head_dim),
        num_warps=4,
    )


def place_heads_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor | None,
    start: int,
    eps: float,
    out: Tensor,
    sums: Tensor,
) -> None:
    """Gradient of [s, 3, h, K] into `out`; `sums` fp32 [programs, 2, K] takes the programs' parts of the weights'."""
    tokens, _, heads, head_dim = qkv.shape
    _place_backward[(num_programs(qkv),)](
        q,
        k,
        v,
        qkv,
        q_weight,
        k_weight,
        cos,
        sin,
        qkv if index is None else index,
        out,
        sums,
        tokens,
        heads,
        qkv.stride(0),
        out.stride(0),
        q.shape[0],
        q.shape[1],
        start,
        head_dim // 2,
        eps,
        INDEXED=index is not None,
        PAIRS=PAIRS,
        HALF=_half_block(head_dim),
        num_warps=4,
    )


def collect_heads(attended: Tensor, mlp: Tensor | None, index: Tensor | None, start: int, out: Tensor) -> None:
    """Rows of [G, N, h / G, K] beside GELU of [s, F] into `out` [s, h K + F]."""
    groups, length, per_group, head_dim = attended.shape
    tokens, total = out.shape
    width = groups * per_group * head_dim
    _collect[(triton.cdiv(tokens, ROWS), triton.cdiv(total, COLUMNS))](
        attended,
        attended if mlp is None else mlp,
        attended if index is None else index,
        out,
        tokens,
        width,
        total - width,
        0 if mlp is None else mlp.stride(0),
        head_dim,
        per_group,
        length,
        start,
        INDEXED=index is not None,
        MLP=mlp is not None,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )


def collect_heads_backward(
    grad: Tensor, mlp: Tensor | None, index: Tensor | None, start: int, attended_out: Tensor, mlp_out: Tensor | None
) -> None:
    """Gradients of `collect_heads` into the stream's rows of `attended_out` and into `mlp_out`."""
    groups, length, per_group, head_dim = attended_out.shape
    tokens, total = grad.shape
    width = groups * per_group * head_dim
    has_mlp = mlp is not None and mlp_out is not None
    _collect_backward[(triton.cdiv(tokens, ROWS), triton.cdiv(total, COLUMNS))](
        grad,
        mlp if mlp is not None else grad,
        grad if index is None else index,
        attended_out,
        mlp_out if mlp_out is not None else grad,
        tokens,
        width,
        total - width,
        mlp.stride(0) if mlp is not None else 0,
        mlp_out.stride(0) if mlp_out is not None else 0,
        head_dim,
        per_group,
        length,
        start,
        INDEXED=index is not None,
        MLP=has_mlp,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )

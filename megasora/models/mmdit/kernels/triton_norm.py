"""Triton kernels of the modulated norm and the gated residual: one program walks over a tile of one sample's tokens, row by row.

A row of H channels is held in fp32 registers; rows are read ahead (`num_stages`). Programs add up their own tile's part of the sums over a
sample's tokens in registers and write it as one row, which `tile_sums` adds up in a fixed order: no atomics, the same bits every time.
The functions at the end launch them; `operators` makes operations of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

NUM_STAGES = 3
"""Rows in flight: at 6 KiB a row and two programs on a multiprocessor some 36 KiB, more than 4.1 TB/s x 0.7 us / 132 = 22 KiB."""


@triton.jit
def _forward(
    x,
    branch,
    gate,
    shift,
    scale,
    tokens,
    out,
    mean,
    rstd,
    tiles,
    hidden,
    eps,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0)
    start, stop, sample = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    pitch = hidden.to(tl.int64)  # offsets of a long pack leave int32
    row = sample * pitch + column
    factor = 1.0 + tl.load(scale + row, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + row, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gates = tl.load(gate + row, mask=inside, other=0.0).to(tl.float32)
    for token in tl.range(start, stop, num_stages=STAGES):
        place = token * pitch + column
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            values += gates * tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
            stored = values.to(tokens.dtype.element_ty)
            tl.store(tokens + place, stored, mask=inside)
            values = stored.to(tl.float32)
        centre = tl.sum(values, axis=0) / hidden
        deviation = tl.where(inside, values - centre, 0.0)
        scaling = tl.rsqrt(tl.sum(deviation * deviation, axis=0) / hidden + eps)
        tl.store(out + place, (deviation * scaling * factor + offset).to(out.dtype.element_ty), mask=inside)
        tl.store(mean + token, centre)
        tl.store(rstd + token, scaling)


@triton.jit
def _backward(
    grad,
    passed,
    x,
    branch,
    mean,
    rstd,
    gate,
    scale,
    grad_x,
    grad_branch,
    sums,
    tiles,
    num_tiles,
    hidden,
    PASSED: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0)
    start, stop, sample = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    pitch = hidden.to(tl.int64)  # offsets of a long pack leave int32
    row = sample * pitch + column
    factor = 1.0 + tl.load(scale + row, mask=inside, other=0.0).to(tl.float32)
    of_shift = tl.zeros([BLOCK], dtype=tl.float32)
    of_scale = tl.zeros([BLOCK], dtype=tl.float32)
    if GATED:
        gates = tl.load(gate + row, mask=inside, other=0.0).to(tl.float32)
        of_gate = tl.zeros([BLOCK], dtype=tl.float32)
    for token in tl.range(start, stop, num_stages=STAGES):
        place = token * pitch + column
        upstream = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        scaling = tl.load(rstd + token)
        normed = tl.where(inside, (values - tl.load(mean + token)) * scaling, 0.0)
        of_shift += upstream
        of_scale += upstream * normed
        upstream *= factor
        along = tl.sum(upstream * normed, axis=0) / hidden
        result = scaling * (upstream - tl.sum(upstream, axis=0) / hidden - normed * along)
        if PASSED:
            result += tl.load(passed + place, mask=inside, other=0.0).to(tl.float32)
        stored = result.to(grad_x.dtype.element_ty)
        tl.store(grad_x + place, stored, mask=inside)
        if GATED:
            result = stored.to(tl.float32)
            of_gate += result * tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_branch + place, (result * gates).to(grad_branch.dtype.element_ty), mask=inside)
    place = tile * pitch + column
    tl.store(sums + place, of_shift, mask=inside)
    tl.store(sums + num_tiles * pitch + place, of_scale, mask=inside)
    if GATED:
        tl.store(sums + 2 * num_tiles * pitch + place, of_gate, mask=inside)


@triton.jit
def _gated(residual, gate, branch, out, tiles, hidden, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    tile = tl.program_id(0)
    start, stop, sample = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    pitch = hidden.to(tl.int64)
    gates = tl.load(gate + sample * pitch + column, mask=inside, other=0.0).to(tl.float32)
    for token in tl.range(start, stop, num_stages=STAGES):
        place = token * pitch + column
        values = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        values += gates * tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(grad, gate, branch, grad_branch, sums, tiles, hidden, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    tile = tl.program_id(0)
    start, stop, sample = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    pitch = hidden.to(tl.int64)
    gates = tl.load(gate + sample * pitch + column, mask=inside, other=0.0).to(tl.float32)
    of_gate = tl.zeros([BLOCK], dtype=tl.float32)
    for token in tl.range(start, stop, num_stages=STAGES):
        place = token * pitch + column
        upstream = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        of_gate += upstream * tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_branch + place, (upstream * gates).to(grad_branch.dtype.element_ty), mask=inside)
    tl.store(sums + tile * pitch + column, of_gate, mask=inside)


GATE_COLUMNS = 1024
"""Columns of a program of the gated residual, which needs no whole rows."""


def row_options(hidden: int) -> dict[str, int]:
    """Block and warps of a program that holds a whole row: 16 channels a thread."""
    block = triton.next_power_of_2(hidden)
    return {"BLOCK": block, "STAGES": NUM_STAGES, "num_warps": max(1, min(16, block // 512))}


def column_options(hidden: int) -> dict[str, int]:
    """Block and warps of a program that holds a part of a row."""
    block = min(GATE_COLUMNS, triton.next_power_of_2(hidden))
    return {"BLOCK": block, "STAGES": NUM_STAGES, "num_warps": max(1, block // 256)}


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, tiles: Tensor, eps: float, out: Tensor, mean: Tensor, rstd: Tensor) -> None:
    """Modulated norm of x [s, H] into `out`, mean and rstd [s, 1] fp32."""
    _forward[(len(tiles),)](x, x, shift, shift, scale, out, out, mean, rstd, tiles, x.shape[1], eps, GATED=False, **row_options(x.shape[1]))


def gated_norm_modulate(
    residual: Tensor,
    gate: Tensor,
    branch: Tensor,
    shift: Tensor,
    scale: Tensor,
    tiles: Tensor,
    eps: float,
    tokens: Tensor,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Gated residual into `tokens`, its modulated norm into `out`."""
    hidden = residual.shape[1]
    _forward[(len(tiles),)](
        residual, branch, gate, shift, scale, tokens, out, mean, rstd, tiles, hidden, eps, GATED=True, **row_options(hidden)
    )


def norm_modulate_backward(
    grad: Tensor,
    passed: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    tiles: Tensor,
    grad_x: Tensor,
    sums: Tensor,
) -> None:
    """Gradient of x; `sums` fp32 [2, tiles, H] takes the tiles' parts of the gradients of shift and scale."""
    hidden = x.shape[1]
    _backward[(len(tiles),)](
        grad,
        grad if passed is None else passed,
        x,
        x,
        mean,
        rstd,
        scale,
        scale,
        grad_x,
        grad_x,
        sums,
        tiles,
        len(tiles),
        hidden,
        PASSED=passed is not None,
        GATED=False,
        **row_options(hidden),
    )


def gated_norm_modulate_backward(
    grad: Tensor,
    passed: Tensor | None,
    tokens: Tensor,
    branch: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor,
    scale: Tensor,
    tiles: Tensor,
    grad_residual: Tensor,
    grad_branch: Tensor,
    sums: Tensor,
) -> None:
    """Gradients of residual and branch; `sums` fp32 [3, tiles, H] takes the tiles' parts of those of shift, scale and gate."""
    hidden = tokens.shape[1]
    _backward[(len(tiles),)](
        grad,
        grad if passed is None else passed,
        tokens,
        branch,
        mean,
        rstd,
        gate,
        scale,
        grad_residual,
        grad_branch,
        sums,
        tiles,
        len(tiles),
        hidden,
        PASSED=passed is not None,
        GATED=True,
        **row_options(hidden),
    )


def gated_residual(residual: Tensor, gate: Tensor, branch: Tensor, tiles: Tensor, out: Tensor) -> None:
    """residual + gate x branch into `out`."""
    hidden = residual.shape[1]
    options = column_options(hidden)
    _gated[(len(tiles), triton.cdiv(hidden, options["BLOCK"]))](residual, gate, branch, out, tiles, hidden, **options)


def gated_residual_backward(grad: Tensor, gate: Tensor, branch: Tensor, tiles: Tensor, grad_branch: Tensor, sums: Tensor) -> None:
    """Gradient of the branch; `sums` fp32 [1, tiles, H] takes the tiles' parts of the gate's."""
    hidden = grad.shape[1]
    options = column_options(hidden)
    _gated_backward[(len(tiles), triton.cdiv(hidden, options["BLOCK"]))](grad, gate, branch, grad_branch, sums, tiles, hidden, **options)

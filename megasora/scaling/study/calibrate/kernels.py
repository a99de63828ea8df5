"""Rates of the kernels that a step is made of, at a model's widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megasora.config.schema import ModelConfig
from megasora.scaling.study.calibrate.timing import Timed, timed

COPIED = 2
"""A copy reads and writes."""
ADAM_BYTES = 7 * 4
"""Of a parameter, fp32: weight, two moments and gradient are read, weight and moments written."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of the table."""

    what: str
    size: float
    """Rows, tokens or bytes; 0 where there is none."""
    rate: float
    """FLOP/s or bytes/s."""
    time: Timed


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What is measured and how long."""

    rows: tuple[int, ...]
    """Of a product."""
    tokens: tuple[int, ...]
    """Of a sample."""
    memory_bytes: tuple[int, ...]
    parameters: int
    """Of the optimizer's update."""
    repeats: int


def matmul(model: ModelConfig, rows: int, *, device: torch.device, dtype: torch.dtype, repeats: int) -> Measured:
    """Forward and backward of [rows, H] x [H, 4 H], the widest of a block's products: 6 rows H 4 H FLOPs."""
    x = torch.randn(rows, model.hidden_size, device=device, dtype=dtype)
    weight = torch.randn(model.ffn_hidden_size, model.hidden_size, device=device, dtype=dtype)
    grad = torch.randn(rows, model.ffn_hidden_size, device=device, dtype=dtype)

    def call() -> None:
        F.linear(x, weight)
        grad @ weight
        grad.t() @ x

    time = timed(call, device=device, repeats=repeats)
    flops = 6 * rows * model.hidden_size * model.ffn_hidden_size
    return Measured(what="matmul", size=rows, rate=flops / time.median_s, time=time)


def attention(model: ModelConfig, tokens: int, *, device: torch.device, dtype: torch.dtype, repeats: int) -> list[Measured]:
    """Forward, 4 s^2 H FLOPs, and backward, 10 s^2 H (2.5 times), of one sample in all heads, by torch's kernel."""
    shape = (1, model.num_attention_heads, tokens, model.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, device=device, dtype=dtype)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), grad)

    one = timed(forward, device=device, repeats=repeats)
    two = timed(both, device=device, repeats=repeats)
    square = tokens * tokens * model.hidden_size
    back = max(two.median_s - one.median_s, two.median_s * 0.1)  # a noisy machine must not give a negative time
    return [
        Measured(what="attention forward", size=tokens, rate=4 * square / one.median_s, time=one),
        Measured(
            what="attention backward",
            size=tokens,
            rate=10 * square / back,
            time=Timed(median_s=back, min_s=max(two.min_s - one.max_s, 0.0), max_s=two.max_s - one.min_s),
        ),
    ]


def memory(size: int, *, device: torch.device, repeats: int) -> Measured:
    """A copy of half of `size` bytes onto as many: what memory-bound kernels can reach."""
    source = torch.empty(size // (COPIED * 4), device=device, dtype=torch.float32).normal_()
    target = torch.empty_like(source)
    time = timed(lambda: target.copy_(source), device=device, repeats=repeats)
    return Measured(what="memory", size=size, rate=COPIED * source.numel() * 4 / time.median_s, time=time)


def adam(parameters: int, *, device: torch.device, repeats: int) -> Measured:
    """torch's fused AdamW over fp32 parameters."""
    weight = torch.zeros(parameters, device=device, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    time = timed(optimizer.step, device=device, repeats=repeats)
    return Measured(what="Adam", size=parameters * ADAM_BYTES, rate=ADAM_BYTES * parameters / time.median_s, time=time)


def launch(*, device: torch.device, repeats: int) -> Measured:
    """Seconds of the host for one small operation."""
    x = torch.zeros(8, device=device)
    time = timed(lambda: x.add_(1.0), device=device, repeats=repeats)
    return Measured(what="launch", size=0, rate=1 / time.median_s, time=time)


def kernels(model: ModelConfig, scale: Scale, *, device: torch.device, dtype: torch.dtype) -> list[Measured]:
    """All of them."""
    kind = {"device": device, "dtype": dtype, "repeats": scale.repeats}
    found = [matmul(model, rows, **kind) for rows in scale.rows]  # type: ignore[arg-type]
    for tokens in scale.tokens:
        found += attention(model, tokens, **kind)  # type: ignore[arg-type]
    found += [memory(size, device=device, repeats=scale.repeats) for size in scale.memory_bytes]
    found.append(adam(scale.parameters, device=device, repeats=scale.repeats))
    found.append(launch(device=device, repeats=scale.repeats))
    return found


def points(found: Sequence[Measured], what: str) -> tuple[tuple[float, float], ...]:
    """(size, rate) of one kind, ascending."""
    return tuple(sorted((float(entry.size), float(entry.rate)) for entry in found if entry.what == what))

"""The Triton kernels as operations of torch, with what they read and write in their schemas: profilers, byte counters and fake tensors see
each as one operation. Triton is imported when one is first computed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

PAIRS = 32
"""(token, head) pairs of a program of `place_heads`: 32 x 128 channels of queries and keys, 32 floats of each in a thread of 4 warps."""

_SCHEMAS = {
    "triton_norm": (
        "norm_modulate(Tensor x, Tensor shift, Tensor scale, Tensor tiles, float eps, Tensor(a!) out, Tensor(b!) mean, Tensor(c!) rstd)",
        "gated_norm_modulate(Tensor residual, Tensor gate, Tensor branch, Tensor shift, Tensor scale, Tensor tiles, float eps, "
        "Tensor(a!) tokens, Tensor(b!) out, Tensor(c!) mean, Tensor(d!) rstd)",
        "norm_modulate_backward(Tensor grad, Tensor? passed, Tensor x, Tensor mean, Tensor rstd, Tensor scale, Tensor tiles, "
        "Tensor(a!) grad_x, Tensor(b!) sums)",
        "gated_norm_modulate_backward(Tensor grad, Tensor? passed, Tensor tokens, Tensor branch, Tensor mean, Tensor rstd, Tensor gate, "
        "Tensor scale, Tensor tiles, Tensor(a!) grad_residual, Tensor(b!) grad_branch, Tensor(c!) sums)",
        "gated_residual(Tensor residual, Tensor gate, Tensor branch, Tensor tiles, Tensor(a!) out)",
        "gated_residual_backward(Tensor grad, Tensor gate, Tensor branch, Tensor tiles, Tensor(a!) grad_branch, Tensor(b!) sums)",
    ),
    "triton_heads": (
        "place_heads(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, Tensor? index, int start, float eps, "
        "Tensor(a!) q, Tensor(b!) k, Tensor(c!) v)",
        "place_heads_backward(Tensor q, Tensor k, Tensor v, Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
        "Tensor? index, int start, float eps, Tensor(a!) out, Tensor(b!) sums)",
        "collect_heads(Tensor attended, Tensor? mlp, Tensor? index, int start, Tensor(a!) out)",
        "collect_heads_backward(Tensor grad, Tensor? mlp, Tensor? index, int start, Tensor(a!) attended_out, Tensor(b!)? mlp_out)",
    ),
}
_LIBRARY = torch.library.Library("megasora", "DEF")


def _define(module: str, schema: str) -> Any:
    name = schema.split("(")[0]
    _LIBRARY.define(f"{schema} -> ()")

    def launch(*arguments: Any) -> None:
        getattr(import_module(f"megasora.models.mmdit.kernels.{module}"), name)(*arguments)

    _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"megasora::{name}", lambda *_arguments: None, lib=_LIBRARY)
    return getattr(torch.ops.megasora, name).default


OPERATORS: dict[str, Any] = {schema.split("(")[0]: _define(module, schema) for module, schemas in _SCHEMAS.items() for schema in schemas}
"""By name; each takes what its schema says and returns nothing."""


def num_programs(qkv: Tensor) -> int:
    """Programs that place [s, 3, h, K]; each writes one row of the sums of the weights' gradients."""
    return -(-qkv.shape[0] * qkv.shape[2] // PAIRS)


def _size(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _place_bytes(qkv: Tensor, *rest: Any) -> int:
    return 2 * _size(qkv) + _size(*rest[:5])


def _place_backward_bytes(q: Tensor, k: Tensor, v: Tensor, qkv: Tensor, *rest: Any) -> int:
    return _size(qkv) + 2 * _size(qkv) // 3 + _size(*rest[:5]) + _size(*rest[-2:])


def _collect_bytes(attended: Tensor, mlp: Tensor | None, index: Tensor | None, start: int, out: Tensor) -> int:
    return 2 * _size(out) + _size(index)


def _collect_backward_bytes(grad: Tensor, mlp: Tensor | None, index: Tensor | None, *_rest: Any) -> int:
    return 2 * _size(grad) + _size(mlp, index)


BYTES_MOVED = {
    "place_heads": _place_bytes,
    "place_heads_backward": _place_backward_bytes,
    "collect_heads": _collect_bytes,
    "collect_heads_backward": _collect_backward_bytes,
}
"""Bytes read and written, from an operation's arguments, where it touches a part of its tensors only: one stream's rows, or q and k."""

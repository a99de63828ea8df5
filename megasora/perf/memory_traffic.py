"""Bytes that operations read and write, counted as they are dispatched; with fake tensors nothing is computed and any size can be counted.

What it is for: the time of what is bound by memory is its bytes over the bandwidth. Matrix products and attention are left out (their time
is their FLOPs), and so is what moves nothing: views, shapes, allocations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MATRIX_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear"})
SKINNY = 64
"""A product with a side below this is bound by its operands' bytes and counts as they do."""
VIEWS = (
    *("alias", "as_strided", "chunk", "detach", "expand", "flatten", "narrow", "permute", "reshape", "select", "slice", "split"),
    *("split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view", "_reshape_alias", "_unsafe_view"),
)
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
MOVE_NOTHING = frozenset((*VIEWS, *ALLOCATIONS, "device", "lift_fresh"))


class MemoryTraffic(TorchDispatchMode):
    """Counts while it is entered.

    Args:
        formulas: bytes from an operation's arguments, by name, where its tensors' sizes would mislead.

    An operation's bytes are those of the tensors it reads plus those it writes; one that changes a tensor in place counts it twice, one
    that fills a given output once. A gather (`index_select`) reads as much as it writes.
    """

    def __init__(self, formulas: Mapping[str, Callable[..., int]] | None = None) -> None:
        super().__init__()
        self.formulas = formulas or {}
        self.bytes: Counter[str] = Counter()
        """By operation."""
        self.calls: Counter[str] = Counter()
        self.product_flops = 0
        """Multiply-adds x 2 of the matrix products left out."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` and count it."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in MOVE_NOTHING:
            return result
        if name in MATRIX_PRODUCTS and (flops := _product_flops(args)) is not None:
            self.product_flops += flops
            return result
        self.bytes[name] += bytes_moved(func, args, kwargs or {}, result, formulas=self.formulas)
        self.calls[name] += 1
        return result

    @property
    def total(self) -> int:
        """Bytes of all operations."""
        return sum(self.bytes.values())


def _product_flops(args: tuple[Any, ...]) -> int | None:
    a, b = [value for value in args if isinstance(value, Tensor)][-2:]
    sides = (*a.shape[-2:], *b.shape[-2:])
    if min(sides) < SKINNY:
        return None
    batch = a.shape[0] if a.dim() == 3 else 1
    return 2 * batch * a.shape[-2] * a.shape[-1] * b.shape[-1]


def bytes_moved(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, *, formulas: Mapping[str, Any]) -> int:
    """Bytes that one dispatched operation reads and writes; see `MemoryTraffic`."""
    name = func.overloadpacket.__name__
    if formula := formulas.get(name):
        return formula(*args)
    if name == "index_select":
        return 2 * _size(result)
    names, written, fills = _arguments(func)
    size = sum((1 if key not in written or fills else 2) * _size(value) for key, value in zip(names, args, strict=False))
    size += sum((1 if key not in written or fills else 2) * _size(value) for key, value in kwargs.items())
    return size + (0 if written else _size(result))


@lru_cache(maxsize=1024)
def _arguments(func: Any) -> tuple[tuple[str, ...], frozenset[str], bool]:
    """(names, names of those it writes, whether it fills them without reading) of an operation's arguments."""
    arguments = func._schema.arguments
    written = frozenset(argument.name for argument in arguments if argument.alias_info is not None and argument.alias_info.is_write)
    fills = func.namespace != "aten" or func._overloadname.endswith("out") or "grad_input" in func._overloadname or "copy" in func.__name__
    return tuple(argument.name for argument in arguments), written, fills


def _size(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(value) if isinstance(tensor, torch.Tensor))

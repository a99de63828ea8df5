"""Host tensors on their way to the device: one pinned buffer and one copy that the host does not wait for.

A copy from pageable memory makes the host wait until the device has done all it was given before (CUDA runtime, "API synchronization
behavior"), one from pinned memory that is asked for as non-blocking does not. Torch keeps a pinned buffer until its copy has been made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 256
"""Bytes; what torch's own allocations start at, so that a part can be read as any type."""


def send(tensors: Sequence[Tensor], *, device: torch.device) -> list[Tensor]:
    """The tensors on `device`: those in host memory as parts of one buffer, others as they are. On the CPU the tensors themselves."""
    waiting = [] if device.type == "cpu" else [tensor for tensor in tensors if tensor.device.type == "cpu"]
    if not waiting:
        return list(tensors)
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in waiting]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    for tensor, part in zip(waiting, buffer.split(sizes), strict=True):
        _as(part, tensor).copy_(tensor)
    parts = iter(buffer.to(device, non_blocking=True).split(sizes))
    return [_as(next(parts), tensor) if tensor.device.type == "cpu" else tensor for tensor in tensors]


def send_tables(tables: Sequence[Any], *, device: torch.device) -> list[Any]:
    """Tensors, and dataclasses with tensors in their fields, on `device`: everything in one copy."""
    found = [tensor for table in tables for tensor in _tensors_of(table).values()]
    sent = iter(send(found, device=device))
    result: list[Any] = []
    for table in tables:
        on_device = {name: next(sent) for name in _tensors_of(table)}
        result.append(replace(table, **on_device) if is_dataclass(table) and not isinstance(table, type) else on_device[""])
    return result


def _as(part: Tensor, like: Tensor) -> Tensor:
    """The first bytes of a part, read as a tensor of that type and shape."""
    return part[: like.nbytes].view(like.dtype).view(like.shape)


def _tensors_of(table: Any) -> dict[str, Tensor]:
    if isinstance(table, Tensor):
        return {"": table}
    values = {field.name: getattr(table, field.name) for field in fields(table)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}

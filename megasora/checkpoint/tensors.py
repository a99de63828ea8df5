"""What a stored tensor is (type, shape) and its bytes as rows. No torch: files are described, hashed and copied without it.

A tensor is a matrix of bytes, uint8 [first dim, bytes of the rest], because every map between formats moves whole rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Rows = NDArray[np.uint8]

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""Bytes of an element by the type names of the safetensors format."""
TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
}
"""The same types as attributes of torch."""
FLOATS = ("F8_E4M3", "F8_E5M2", "BF16", "F16", "F32", "F64")
"""Those of numbers; one of fewer bytes is exact in one of more."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Type and shape of a stored tensor."""

    dtype: str
    """A key of `ITEM_BYTES`."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes."""
        return self.numel * ITEM_BYTES[self.dtype]

    @property
    def num_rows(self) -> int:
        """Extent of the first dim; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return prod(self.shape[1:]) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class TensorReader(Protocol):
    """Where tensors come from."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, in the order it is stored."""
        ...

    def rows(self, key: str) -> Rows:
        """A tensor's bytes [num_rows, row_bytes]; a read-only view of the file where it is stored in one run."""
        ...

    def release(self, key: str) -> None:
        """Say that the tensor is not needed again soon: its pages may leave memory."""
        ...


def as_torch(rows: Rows, info: TensorInfo) -> Tensor:
    """A torch tensor with its own memory."""
    import torch

    dtype = getattr(torch, TORCH_NAMES[info.dtype])
    return torch.from_numpy(np.array(rows, copy=True).reshape(-1)).view(dtype).reshape(info.shape)


def from_torch(tensor: Tensor) -> tuple[Rows, TensorInfo]:
    """Bytes and description of a torch tensor."""
    import torch

    info = TensorInfo(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))
    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return flat.reshape(info.num_rows, info.row_bytes), info


def dtype_name(dtype: object) -> str:
    """Name of a torch dtype.

    Raises:
        ValueError: a type that files of weights do not have.
    """
    short = str(dtype).removeprefix("torch.")
    for name, torch_name in TORCH_NAMES.items():
        if torch_name == short:
            return name
    raise ValueError(f"weights of type {dtype} cannot be stored")


def cast(rows: Rows, info: TensorInfo, dtype: str) -> Rows:
    """The same tensor in another type (rounded to nearest even by torch)."""
    import torch

    return from_torch(as_torch(rows, info).to(getattr(torch, TORCH_NAMES[dtype])))[0]


class StateDictReader:
    """Tensors in memory, such as a module's state_dict, as a reader."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._stored = {key: from_torch(tensor) for key, tensor in tensors.items()}

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor."""
        return {key: info for key, (_, info) in self._stored.items()}

    def rows(self, key: str) -> Rows:
        """A tensor's bytes."""
        return self._stored[key][0]

    def release(self, key: str) -> None:
        """Nothing to release."""

"""Safetensors files and folders: lazy, memory-mapped reads; writes that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megasora.config.errors import UserError


class SafetensorsReader:
    """Tensors of one .safetensors file, or of a folder of them (with or without an index).

    Raises:
        UserError: nothing there, a truncated or foreign file, a key in two files, an index that points outside the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._where: dict[str, Any] = {}
        for file in _files_of(path):
            try:
                handle = safe_open(str(file), framework="pt")
                keys = list(handle.keys())
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is no complete safetensors file: {error}") from error
            for key in keys:
                if key in self._where:
                    raise UserError(f"{path}: tensor {key} stands in two files; remove one of them")
                self._where[key] = handle

    def keys(self) -> list[str]:
        """Tensor names."""
        return list(self._where)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape without reading."""
        return tuple(self._where[key].get_slice(key).get_shape())

    def read(self, key: str) -> Tensor:
        """The tensor."""
        tensor: Tensor = self._where[key].get_tensor(key)
        return tensor


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no weights at {path}")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if not indices:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{path} holds no .safetensors file")
        return files
    try:
        names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{indices[0]} is no index of safetensors shards ({error})") from error
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{indices[0]} points outside its folder: {name!r}")
        if not (path / name).is_file():
            raise UserError(f"{indices[0]} names {name}, which is missing")
    return [path / name for name in names]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], *, metadata: Mapping[str, str]) -> None:
    """Write one file; it appears under its name only when complete and synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    items = dict(tensors)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in items.items()}, str(temporary), metadata=dict(metadata))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

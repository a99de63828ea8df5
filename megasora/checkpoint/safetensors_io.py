"""Safetensors files and folders: memory-mapped reads that trust nothing in a header, and writes of a layout known in advance.

The reader checks what a hostile file could say (absurd header sizes, duplicate keys, overlapping or missing ranges, an index that points
outside its folder) before a byte of a tensor is touched. Format: huggingface/safetensors README, "Format".
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megasora.checkpoint.tensors import ITEM_BYTES, Rows, TensorInfo, as_torch, from_torch
from megasora.config.errors import UserError
from megasora.config.files import written_whole

MAX_HEADER_BYTES = 100_000_000
"""Longest header a reader accepts (safetensors/src/tensor.rs, MAX_HEADER_SIZE)."""
MAX_EXTENT = 1 << 62
"""Larger extents or offsets cannot be real and would only overflow."""


class BadFileError(UserError):
    """A file that is no sound safetensors file."""


class SafetensorsFile:
    """One file, mapped into memory.

    Raises:
        BadFileError: not readable, or its header does not describe exactly its bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                start, header = _header(file.read(8), file, size=size, path=path)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise BadFileError(f"cannot read {path}: {error.strerror or error}") from error
        self.metadata, self.infos, self._offsets = _layout(header, num_bytes=size - start, path=path)
        self._start = start

    def rows(self, key: str) -> Rows:
        """A tensor's bytes, a view of the file."""
        info = self.infos[key]
        start = self._start + self._offsets[key]
        self._advise(mmap.MADV_WILLNEED, start, info.num_bytes)
        flat = np.frombuffer(self._map, dtype=np.uint8, count=info.num_bytes, offset=start)
        return flat.reshape(info.num_rows, info.row_bytes)

    def release(self, key: str) -> None:
        """Let the tensor's pages go."""
        self._advise(mmap.MADV_DONTNEED, self._start + self._offsets[key], self.infos[key].num_bytes)

    def _advise(self, advice: int, start: int, length: int) -> None:
        aligned = start // mmap.PAGESIZE * mmap.PAGESIZE
        if length:
            self._map.madvise(advice, aligned, start + length - aligned)


def _header(prefix: bytes, file: Any, *, size: int, path: Path) -> tuple[int, dict[str, Any]]:
    """(offset of the data, header)."""
    if len(prefix) < 8:
        raise BadFileError(f"{path} is no safetensors file: it has {size} bytes")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or length < 2 or 8 + length > size:
        raise BadFileError(f"{path} is no complete safetensors file: its header would be {length:,} bytes of {size:,}")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"{path} is no safetensors file: its header is no JSON ({_short(error)})") from error
    if not isinstance(header, dict):
        raise BadFileError(f"{path} is no safetensors file: its header is a {type(header).__name__}")
    return 8 + length, header


def _short(error: Exception) -> str:
    return str(error)[:120]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} stands twice")
    return result


def _layout(header: dict[str, Any], *, num_bytes: int, path: Path) -> tuple[dict[str, str], dict[str, TensorInfo], dict[str, int]]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadFileError(f"{path}: __metadata__ is no table of strings")
    infos: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for key, entry in header.items():
        infos[key], start, stop = _entry(key, entry, path)
        spans.append((start, stop, key))
    position = 0
    for start, stop, key in sorted(spans):
        if start != position:
            raise BadFileError(f"{path}: tensor {_name(key)} starts at {start}, but the one before ends at {position}")
        position = stop
    if position != num_bytes:
        raise BadFileError(f"{path} is no complete safetensors file: {num_bytes:,} bytes of data, its header describes {position:,}")
    spans.sort()
    return dict(metadata), {key: infos[key] for _, _, key in spans}, {key: start for start, _, key in spans}


def _name(key: str) -> str:
    return repr(key if len(key) <= 100 else key[:100] + "...")


def _entry(key: str, entry: Any, path: Path) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadFileError(f"{path}: tensor {_name(key)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise BadFileError(f"{path}: tensor {_name(key)} has the unknown type {str(dtype)[:40]!r}")
    if not _extents(shape) or not _extents(offsets) or len(offsets) != 2:
        raise BadFileError(f"{path}: tensor {_name(key)} has an impossible shape or offsets")
    info = TensorInfo(dtype=dtype, shape=tuple(shape))
    if offsets[1] - offsets[0] != prod(shape) * ITEM_BYTES[dtype]:
        raise BadFileError(f"{path}: tensor {_name(key)} of {info} has {offsets[1] - offsets[0]} bytes")
    return info, offsets[0], offsets[1]


def _extents(values: Any) -> bool:
    if not isinstance(values, list) or len(values) > 32:
        return False
    return all(type(value) is int and 0 <= value < MAX_EXTENT for value in values)


class SafetensorsReader:
    """Tensors of one .safetensors file, or of a folder of them (with or without an index).

    Raises:
        UserError: nothing there, an unsound file, a key in two files, an index that does not describe its files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [SafetensorsFile(file) for file in _files_of(path)]
        self._where: dict[str, SafetensorsFile] = {}
        for file in self.files:
            for key in file.infos:
                if key in self._where:
                    raise BadFileError(f"{path}: tensor {_name(key)} stands in {self._where[key].path.name} and {file.path.name}")
                self._where[key] = file
        if path.is_dir():
            _check_index(path, self._where)

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor, file by file in stored order."""
        return {key: file.infos[key] for key, file in self._where.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """Strings the files carry besides tensors."""
        return {name: value for file in self.files for name, value in file.metadata.items()}

    def rows(self, key: str) -> Rows:
        """A tensor's bytes, a view of the file."""
        return self._where[key].rows(key)

    def release(self, key: str) -> None:
        """Let the tensor's pages go."""
        self._where[key].release(key)

    def keys(self) -> list[str]:
        """Tensor names."""
        return list(self._where)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape without reading."""
        return self._where[key].infos[key].shape

    def read(self, key: str) -> Tensor:
        """The tensor, as torch's."""
        return as_torch(self.rows(key), self._where[key].infos[key])


def _index_of(folder: Path) -> tuple[Path, dict[str, str]] | None:
    """The folder's index and its weight map.

    Raises:
        BadFileError: two indices, or one that is no map from tensors to files in the folder.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        return None
    if len(indices) > 1:
        raise BadFileError(f"{folder} has {len(indices)} indices ({', '.join(path.name for path in indices[:3])}); keep one")
    try:
        if indices[0].stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(f"it has {indices[0].stat().st_size:,} bytes")
        table = json.loads(indices[0].read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)["weight_map"]
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise ValueError("weight_map is no table of file names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadFileError(f"{indices[0]} is no index of safetensors shards ({_short(error)})") from error
    for name in set(table.values()):
        if Path(name).name != name or name in ("", ".", ".."):
            raise BadFileError(f"{indices[0]} points outside its folder: {_name(name)}")
    return indices[0], table


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no weights at {path}")
    index = _index_of(path)
    if index is None:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{path} holds no .safetensors file")
        return files
    names = sorted(set(index[1].values()))
    for name in names:
        if not (path / name).is_file() or "\0" in name:
            raise BadFileError(f"{index[0]} names {_name(name)}, which is missing")
    return [path / name for name in names]


def _check_index(folder: Path, where: Mapping[str, SafetensorsFile]) -> None:
    index = _index_of(folder)
    if index is None:
        return
    table = {key: file.path.name for key, file in where.items()}
    if table != index[1]:
        wrong = sorted(key for key in table.keys() | index[1].keys() if table.get(key) != index[1].get(key))
        raise BadFileError(f"{index[0]} and its files disagree about {len(wrong)} tensors, the first {_name(wrong[0])}")


class SafetensorsWriter:
    """Writes one file whose tensors are known in advance, in any order and from several threads.

    Args:
        path: the file; it has its full length from the start.
        infos: every tensor, in stored order.
        metadata: strings for the header.
        keep: go on with a file of the same layout instead of starting over.
    """

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo], *, metadata: Mapping[str, str], keep: bool = False) -> None:
        self.path = path
        header = encoded_header(infos, metadata=metadata)
        self._offsets: dict[str, int] = {}
        position = len(header)
        for key, info in infos.items():
            self._offsets[key] = position
            position += info.num_bytes
        flags = os.O_RDWR | os.O_CREAT | (0 if keep else os.O_TRUNC)
        self._descriptor = os.open(path, flags, 0o644)
        os.ftruncate(self._descriptor, position)
        _write_all(self._descriptor, header, 0)

    def write(self, key: str, rows: Rows) -> None:
        """Write a tensor's bytes."""
        _write_all(self._descriptor, np.ascontiguousarray(rows).reshape(-1).data, self._offsets[key])

    def sync(self) -> None:
        """Wait until everything written is on disk."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Sync and close."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)


def encoded_header(infos: Mapping[str, TensorInfo], *, metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data: length and JSON, padded so that the data starts at a multiple of 8."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for key, info in infos.items():
        table[key] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, position + info.num_bytes]}
        position += info.num_bytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_all(descriptor: int, data: Any, offset: int) -> None:
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + (1 << 30)], offset + done)


def stored_order(infos: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Keys with wide types first, so that every tensor is aligned to its type (the order the safetensors library writes)."""
    return iter(sorted(infos, key=lambda key: (-ITEM_BYTES[infos[key].dtype], key)))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Write one file; it appears under its name only when complete and synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {key: from_torch(tensor) for key, tensor in tensors.items()}
    infos = {key: info for key, (_, info) in described.items()}
    with written_whole(path) as temporary:
        writer = SafetensorsWriter(temporary, {key: infos[key] for key in stored_order(infos)}, metadata=metadata)
        for key, (rows, _) in described.items():
            writer.write(key, rows)
        writer.close()

"""Megatron distributed checkpoints (torch_dist) tensor by tensor: read without executing anything in them, written without a world.

The folder keeps its table of contents (`.metadata`) and every piece of a tensor as a pickle. Both are read by unpicklers whose only
globals are the inert stand-ins below; a name outside the table is refused. Stand-ins that outlive a load are strings and functions: a
pickle can call an object's __setstate__, so nothing shared may have one. Sources: torch/distributed/checkpoint/{metadata,filesystem}.py,
megatron/core/dist_checkpointing/core.py (metadata.json, common.pt), torch/serialization.py (the zip of a saved tensor).
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from megasora.checkpoint.tensors import ITEM_BYTES, TORCH_NAMES, Rows, TensorInfo, as_torch
from megasora.config.errors import UserError

METADATA = ".metadata"
MAX_METADATA_BYTES = 1 << 30
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
"""Contents of metadata.json (megatron-core 0.16.1, dist_checkpointing/core.py CheckpointingConfig)."""
_DTYPES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
_STORAGES = {
    "BFloat16Storage": "BF16",
    "HalfStorage": "F16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "BoolStorage": "BOOL",
}
HOLDS = tuple(_STORAGES.values())
"""Types that a distributed checkpoint can be read back in: torch.save names FP8's rebuilding by a function that takes code."""


class BadCheckpointError(UserError):
    """A checkpoint folder that is not what it should be."""


class _Record:
    """An unpickled object as inert data: constructor arguments and state, no behaviour."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """A value of the state."""
        if not isinstance(self.state, dict) or name not in self.state:
            raise ValueError(f"a record lacks {name}")
        return self.state[name]


class _Ordered(dict[Any, Any]):
    """Stands for an OrderedDict."""


def _size(*arguments: Any) -> tuple[int, ...]:
    (values,) = arguments or ((),)
    if not isinstance(values, tuple | list) or not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise ValueError("a size is not made of whole numbers")
    return tuple(values)


def _same(*arguments: Any) -> Any:
    return arguments


_METADATA_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _same,
    ("collections", "OrderedDict"): _Ordered,
    **{("torch", torch_name): name for torch_name, name in _DTYPES.items()},
    **{
        (f"torch.distributed.checkpoint.{module}", name): _Record
        for module, names in {
            "metadata": (
                "Metadata",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "TensorProperties",
                "MetadataIndex",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            ),
            "filesystem": ("_StorageInfo", "_StoragePrefix"),
            "planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
        }.items()
        for name in names
    },
}


@dataclass(frozen=True)
class _Stored:
    """A tensor as torch.save describes it."""

    storage: str
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Stored:
    dtype, key = storage
    if type(offset) is not int or offset < 0:
        raise ValueError("a tensor's offset is not a whole number")
    return _Stored(storage=key, dtype=dtype, offset=offset, size=_size(size), stride=_size(stride))


_TENSOR_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("collections", "OrderedDict"): _Ordered,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _RestrictedUnpickler(pickle.Unpickler):
    """Knows the names it is given and no others."""

    def __init__(self, file: Any, allowed: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        """The inert stand-in of a global."""
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a checkpoint has no use for")
        return self._allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """(type, key) of a storage."""
        kind, dtype, key = pid[0], pid[1], pid[2]
        if kind != "storage" or dtype not in ITEM_BYTES or not isinstance(key, str):
            raise pickle.UnpicklingError("a storage is not described by type and name")
        return dtype, key


def _unpickle(data: bytes, allowed: Mapping[tuple[str, str], Any], *, what: str) -> Any:
    try:
        for operation, argument, _ in pickletools.genops(data):
            if "PUT" in operation.name and isinstance(argument, int) and argument > len(data):
                raise ValueError("it numbers more objects than it has bytes")  # the unpickler would allocate for all of them
        return _RestrictedUnpickler(io.BytesIO(data), allowed).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise BadCheckpointError(f"{what} cannot be read: {str(error)[:200]}") from error
    except (MemoryError, RecursionError, OverflowError, ImportError) as error:
        raise BadCheckpointError(f"{what} cannot be read: {type(error).__name__}") from error


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A rectangle of a tensor and where its bytes are."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a checkpoint."""

    info: TensorInfo
    chunks: tuple[Chunk, ...]


def is_megatron_checkpoint(path: Path) -> bool:
    """Whether a folder is a torch_dist checkpoint (Megatron's or ours)."""
    return path.is_dir() and (path / METADATA).is_file() and (path / "metadata.json").is_file()


def read_contents(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its full name.

    Raises:
        BadCheckpointError: the table of contents is damaged, or names anything but tensors in this folder.
    """
    path = folder / METADATA
    try:
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise BadCheckpointError(f"{path} has {path.stat().st_size:,} bytes, too many for a table of contents")
        data = path.read_bytes()
    except OSError as error:
        raise BadCheckpointError(f"{folder} has no readable {METADATA}: {error.strerror}") from error
    record = _unpickle(data, _METADATA_GLOBALS, what=str(path))
    try:
        return _contents(record)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadCheckpointError(f"{path} is no table of contents of a distributed checkpoint: {str(error)[:200]}") from error


def _contents(record: _Record) -> dict[str, StoredTensor]:
    places: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
    for index, place in record.field("storage_data").items():
        if index.state.get("offset") is None:
            continue  # a pickled object: we have no use for it
        name = place.field("relative_path")
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"a piece points outside the folder: {str(name)[:100]!r}")
        start, length = place.field("offset"), place.field("length")
        if type(start) is not int or type(length) is not int or start < 0 or length < 1:
            raise ValueError(f"a piece lies at {start}, {length}")
        places[index.field("fqn"), index.field("offset")] = (name, start, length)
    tensors: dict[str, StoredTensor] = {}
    for key, entry in record.field("state_dict_metadata").items():
        if not isinstance(entry.state, dict) or "properties" not in entry.state:
            continue
        dtype = entry.field("properties").state[0]
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise ValueError(f"{key} has no type of a tensor")
        info = TensorInfo(dtype=dtype, shape=_size(entry.field("size")))
        chunks = []
        for chunk in entry.field("chunks"):
            offset = chunk.field("offsets")
            file, start, length = places[key, offset]
            chunks.append(Chunk(offset=offset, shape=chunk.field("sizes"), file=file, start=start, length=length))
        _check_cover(key, info, chunks)
        tensors[key] = StoredTensor(info=info, chunks=tuple(chunks))
    return tensors


def _check_cover(key: str, info: TensorInfo, chunks: list[Chunk]) -> None:
    """The rectangles lie inside the tensor, apart from each other, and have as many elements as it."""
    if len(info.shape) not in (1, 2) and (not info.shape or len(chunks) > 1):  # kernels of convolutions lie in one piece
        raise ValueError(f"{key} has {len(info.shape)} dims, weights in pieces have one or two")
    if sum(prod(chunk.shape) for chunk in chunks) != info.numel:
        raise ValueError(f"the pieces of {key} do not cover it")
    for number, one in enumerate(chunks):
        if len(one.offset) != len(info.shape) or len(one.shape) != len(info.shape):
            raise ValueError(f"a piece of {key} has another rank")
        if any(start + extent > whole for start, extent, whole in zip(one.offset, one.shape, info.shape, strict=True)):
            raise ValueError(f"a piece of {key} lies outside it")
        for other in chunks[number + 1 :]:
            apart = (a + n <= b or b + m <= a for a, n, b, m in zip(one.offset, one.shape, other.offset, other.shape, strict=True))
            if not any(apart):
                raise ValueError(f"pieces of {key} overlap")


class _SliceFile(io.RawIOBase):
    """A part of a mapped file as a file, for zipfile."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._position = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        origin = {0: 0, 1: self._position, 2: len(self._view)}[whence]
        if origin + offset < 0:
            raise OSError("negative position")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        part = self._view[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


_DAMAGE = (
    zipfile.BadZipFile,
    struct.error,
    KeyError,
    ValueError,
    TypeError,
    IndexError,
    NotImplementedError,
    RuntimeError,
    OverflowError,
    OSError,
    EOFError,
)
"""What reading a damaged archive can raise."""


class MegatronReader:
    """Tensors of a checkpoint under one prefix (`model.`, `ema.`, `master.`), by their names without it.

    Raises:
        BadCheckpointError: the table of contents is damaged.
    """

    def __init__(self, folder: Path, *, prefix: str = "model.") -> None:
        self.folder, self.prefix = folder, prefix
        everything = read_contents(folder)
        self.tensors = {key.removeprefix(prefix): stored for key, stored in everything.items() if key.startswith(prefix)}
        self.prefixes = sorted({key.split(".", 1)[0] for key in everything})
        self._maps: dict[str, mmap.mmap] = {}

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor under the prefix, in the order of the files."""
        place = {key: (stored.chunks[0].file, stored.chunks[0].start) for key, stored in self.tensors.items() if stored.chunks}
        return {key: self.tensors[key].info for key in sorted(self.tensors, key=lambda key: place.get(key, ("", 0)))}

    def rows(self, key: str) -> Rows:
        """A tensor's bytes; a view of the file when it was stored in one piece."""
        stored = self.tensors[key]
        info = stored.info
        if len(stored.chunks) == 1:
            return self._chunk(key, stored.chunks[0], info.dtype).reshape(info.num_rows, info.row_bytes)
        item = ITEM_BYTES[info.dtype]
        whole = np.empty((info.num_rows, info.row_bytes), dtype=np.uint8)
        for chunk in stored.chunks:
            columns = slice(None)
            if len(info.shape) == 2:
                columns = slice(chunk.offset[1] * item, (chunk.offset[1] + chunk.shape[1]) * item)
            part = self._chunk(key, chunk, info.dtype)
            target = whole[chunk.offset[0] : chunk.offset[0] + chunk.shape[0], columns]
            target[...] = part.reshape(target.shape)
        return whole

    def release(self, key: str) -> None:
        """Let the tensor's pages go."""
        for chunk in self.tensors[key].chunks:
            aligned = chunk.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map(chunk.file).madvise(mmap.MADV_DONTNEED, aligned, chunk.start + chunk.length - aligned)

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            try:
                with (self.folder / name).open("rb") as file:
                    self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise BadCheckpointError(f"{self.folder / name} cannot be read: {error}") from error
        return self._maps[name]

    def _chunk(self, key: str, chunk: Chunk, dtype: str) -> Rows:
        """A rectangle's bytes, flat."""
        mapped = self._map(chunk.file)
        what = f"{self.folder / chunk.file}: {self.prefix}{key}"
        if chunk.start + chunk.length > len(mapped):
            raise BadCheckpointError(f"{what} lies outside the file; the checkpoint is incomplete")
        aligned = chunk.start // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, aligned, chunk.start + chunk.length - aligned)
        view = memoryview(mapped)[chunk.start : chunk.start + chunk.length]
        try:
            with zipfile.ZipFile(_SliceFile(view)) as archive:
                names = {name.split("/", 1)[-1]: name for name in archive.namelist()}
                description = _record(archive.getinfo(names["data.pkl"]), view)
                stored = _unpickle(description.tobytes(), _TENSOR_GLOBALS, what=what)
                if not isinstance(stored, _Stored) or stored.dtype != dtype or stored.size != chunk.shape:
                    raise ValueError(f"it is {stored}, the table of contents describes {dtype} {chunk.shape}")
                data = _record(archive.getinfo(names[f"data/{stored.storage}"]), view)
            return _strided(data, stored, ITEM_BYTES[dtype])
        except _DAMAGE as error:
            raise BadCheckpointError(f"{what} is damaged: {str(error)[:200]}") from error


def _record(entry: zipfile.ZipInfo, view: memoryview) -> Rows:
    """A stored (not compressed) record of an archive as a view; its local header holds two lengths at bytes 26 and 28 (PKZIP 4.3.7)."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise ValueError("its bytes are compressed or encrypted")
    local = bytes(view[entry.header_offset : entry.header_offset + 30])
    if local[:4] != b"PK\3\4":
        raise ValueError("a local header is missing")
    start = entry.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    if start + entry.file_size > len(view):
        raise ValueError("a record reaches past its archive")
    return np.frombuffer(view, dtype=np.uint8, count=entry.file_size, offset=start)


def _strided(data: Rows, stored: _Stored, item: int) -> Rows:
    count, dense, expected = prod(stored.size), True, 1
    for extent, stride in zip(reversed(stored.size), reversed(stored.stride), strict=True):
        dense = dense and (extent == 1 or stride == expected)
        expected *= extent
    last = stored.offset + sum((extent - 1) * stride for extent, stride in zip(stored.size, stored.stride, strict=True)) + 1
    if count and last * item > len(data):
        raise ValueError("the tensor reaches past its storage")
    if dense:
        return data[stored.offset * item : (stored.offset + count) * item]
    cells = data[: len(data) // item * item].reshape(-1, item)[stored.offset :]
    view = np.lib.stride_tricks.as_strided(cells, (*stored.size, item), (*(stride * item for stride in stored.stride), 1), writeable=False)
    return np.ascontiguousarray(view).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class Written:
    """Where a tensor was put."""

    file: str
    start: int
    length: int


class MegatronFileWriter:
    """Appends whole tensors to one data file of a checkpoint; several of them work side by side.

    Args:
        path: the file.
        keep_bytes: go on after so many bytes of an interrupted file.
    """

    def __init__(self, path: Path, *, keep_bytes: int = 0) -> None:
        self.path = path
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(descriptor, keep_bytes)
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self._file.seek(keep_bytes)

    def write(self, rows: Rows, info: TensorInfo) -> Written:
        """Append a tensor."""
        import torch

        flat = np.ascontiguousarray(rows).reshape(-1)
        tensor = torch.frombuffer(flat, dtype=getattr(torch, TORCH_NAMES[info.dtype])) if info.numel else as_torch(rows, info)
        start = self._file.tell()
        torch.save(tensor.reshape(info.shape), self._file)
        return Written(file=self.path.name, start=start, length=self._file.tell() - start)

    def sync(self) -> None:
        """Wait until everything written is on disk."""
        os.fdatasync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        os.fsync(self._file.fileno())
        self._file.close()


def write_contents(folder: Path, written: Mapping[str, tuple[TensorInfo, Written]]) -> None:
    """Write the table of contents, metadata.json and an empty common.pt: Megatron's dist_checkpointing can load the folder."""
    import torch
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint import metadata as dcp

    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for key, (info, place) in written.items():
        dtype = getattr(torch, TORCH_NAMES[info.dtype])
        origin, size = torch.Size([0] * len(info.shape)), torch.Size(info.shape)
        entries[key] = dcp.TensorStorageMetadata(
            properties=dcp.TensorProperties(dtype=dtype), size=size, chunks=[dcp.ChunkStorageMetadata(offsets=origin, sizes=size)]
        )
        index = dcp.MetadataIndex(key, origin, 0)
        places[index] = filesystem._StorageInfo(relative_path=place.file, offset=place.start, length=place.length)
    table = dcp.Metadata(state_dict_metadata=entries, storage_data=places, storage_meta=dcp.StorageMeta())
    _write_synced(folder / METADATA, pickle.dumps(table))
    _write_synced(folder / "metadata.json", json.dumps(BACKEND).encode())
    common = io.BytesIO()
    torch.save({}, common)
    _write_synced(folder / "common.pt", common.getvalue())


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

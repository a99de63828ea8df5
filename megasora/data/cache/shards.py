"""Shards of encoded clips: WebDataset tar files with an index beside each, written whole or not at all, read by offset.

Shard 12 is `shard-000012.tar` with the members `<key>.latents.safetensors`, `<key>.text.safetensors` and `<key>.json` of each sample, one
after another; `shard-000012.index.npy` says where they are, `shard-000012.failed.jsonl` names the clips that failed, and
`shard-000012.json`, written last, holds sizes and hashes: with it the shard is finished. Bytes depend only on the samples.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import os
import tarfile
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megasora.config.files import hidden_beside, written_whole
from megasora.data.plan import PlannedClip

MEMBERS = ("latents.safetensors", "text.safetensors", "json")
"""Members of a sample in stored order; the facts in JSON come last, so that one read takes both tensor files."""
INDEX = np.dtype(
    [
        ("sample", "<i8"),  # number among the planned clips
        ("row", "<i8"),  # of the manifest
        ("num_frames", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("stride", "<i4"),
        ("failed", "?"),
        ("key", "S48"),
        ("offset", "<i8", (3,)),  # of each member's content in the tar
        ("bytes", "<i8", (3,)),  # 0: there is no such member
        ("checksum", "<u4", (3,)),
    ]
)
"""One row per planned clip of the shard."""
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of each tensor of a member."""

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
"""Two empty blocks end a tar."""
_PAGE_BYTES = 4096
_GROUP_BYTES = 64 * _PAGE_BYTES
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class BadSampleError(Exception):
    """A stored sample cannot be used; the message is the reason. It is skipped and counted."""


class BadShardError(Exception):
    """A shard is missing, unfinished or not as it was written; the message is the reason."""


def key_of_clip(clip: PlannedClip) -> str:
    """Name of a sample: its row and the shape it trains at. No dots, which would end a WebDataset key."""
    return f"{clip.clip.row:09d}-{clip.num_frames}f-{clip.height}x{clip.width}-s{clip.stride}"


def shard_name(number: int) -> str:
    """File name of a shard without its ending."""
    return f"shard-{number:06d}"


_ONE_PARSER = threading.Lock()
"""numpy reads an array's header with ast.literal_eval, which Python 3.11 may refuse when two threads run it at once: "AST constructor
recursion depth mismatch" (python/cpython issue 106905)."""


def checksum(data: Any) -> int:
    """Checksum of a member, at memory speed: CRC-32 of all bytes would be slower than reading them from the page cache.

    Groups of 64 pages of 4 KiB are added up page on page, as 64-bit words modulo 2^64; CRC-32 goes over the sums and the bytes left over.
    It sees every change of one word, words that changed places within a page, and pages that are missing, zero or another page's; it does
    not see pages that only changed places within their group, nor intent: the SHA-256 of the whole shard is in its facts.
    """
    flat = np.frombuffer(data, np.uint8)
    in_groups, in_pages = flat.size // _GROUP_BYTES * _GROUP_BYTES, flat.size // _PAGE_BYTES * _PAGE_BYTES
    groups = flat[:in_groups].view("<u8").reshape(-1, _GROUP_BYTES // _PAGE_BYTES, _PAGE_BYTES // 8)
    pages = flat[in_groups:in_pages].view("<u8").reshape(-1, _PAGE_BYTES // 8)
    crc = zlib.crc32(groups.sum(axis=1, dtype=np.uint64).data)
    crc = zlib.crc32(pages.sum(axis=0, dtype=np.uint64).data, crc)
    return zlib.crc32(flat[in_pages:].data, crc)


def safetensors_header(layout: Layout) -> bytes:
    """The bytes before the data of a safetensors file, padded so that the data start at a multiple of 8."""
    table: dict[str, Any] = {}
    position = 0
    for name in _stored_order(layout):
        dtype, shape = layout[name]
        num_bytes = math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + num_bytes]}
        position += num_bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def safetensors_size(layout: Layout) -> int:
    """Bytes of a safetensors file with these tensors."""
    return len(safetensors_header(layout)) + sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of contiguous CPU copies of the tensors."""
    layout = layout_of(tensors)
    parts = [safetensors_header(layout)]
    parts += [tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for name in _stored_order(layout)]
    return b"".join(parts)


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Type and shape of each tensor."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _stored_order(layout: Layout) -> list[str]:
    """Wide types first, so that every tensor is aligned to its type."""
    return sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))


def tensors_in(buffer: NDArray[np.uint8], start: int, num_bytes: int) -> dict[str, Tensor]:
    """Tensors of a safetensors file that lies in a buffer; they share its memory.

    Raises:
        BadSampleError: it is no such file.
    """
    data = start + 8 + int.from_bytes(buffer[start : start + 8].tobytes(), "little")
    stop = start + num_bytes
    if data > stop:
        raise BadSampleError("a member is shorter than its safetensors header says")
    entries = _parsed_header(buffer[start + 8 : data].tobytes())
    if any(data + offset + math.prod(shape) * dtype.itemsize > stop for _, dtype, shape, offset in entries):
        raise BadSampleError("a tensor reaches over the end of its member")
    return {
        name: torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape), offset=data + offset).view(shape)
        for name, dtype, shape, offset in entries
    }


@lru_cache(maxsize=4096)
def _parsed_header(header: bytes) -> tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]:
    """(name, type, shape, offset) of each tensor; samples of one shape share their header."""
    try:
        table = json.loads(header)
        return tuple((name, _DTYPES[fact["dtype"]], tuple(fact["shape"]), int(fact["data_offsets"][0])) for name, fact in table.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadSampleError(f"a member has no safetensors header ({type(error).__name__})") from error


def tar_bytes(member_sizes: Sequence[int]) -> int:
    """Bytes that members of these sizes take in a tar, headers and padding included."""
    return sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in member_sizes)


END_BYTES = len(_END)
"""What every tar has beyond its members."""


@dataclass(frozen=True, kw_only=True)
class ShardFacts:
    """What `shard-000012.json` says about a finished shard."""

    tar_bytes: int
    tar_sha256: str
    index_sha256: str
    samples: int
    """Rows of the index."""
    failed: int


class ShardWriter:
    """Writes one shard under a hidden name and makes it appear when it is whole; leaving it with an error removes what was written.

    Args:
        folder: of the cache.
        number: of the shard.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.bytes_written = 0
        self._rows: list[tuple[Any, ...]] = []
        self._failures: list[dict[str, Any]] = []
        self._sha256 = hashlib.sha256()
        self._temporary = hidden_beside(folder / f"{shard_name(number)}.tar")
        self._file = self._temporary.open("wb")
        # says to a cleaner that the writer is alive; a file system without locks leaves cleaning to the name of the host
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._temporary.unlink(missing_ok=True)  # first, for closing writes what is buffered and fails again on a full disk
        self._file.close()

    def add(self, sample: int, clip: PlannedClip, members: Mapping[str, bytes]) -> None:
        """Append a sample.

        Args:
            sample: its number among the planned clips.
            clip: what it is.
            members: content by name of MEMBERS.
        """
        places: list[tuple[int, int, int]] = []
        for name in MEMBERS:
            content = members.get(name, b"")
            if content:
                header = tarfile.TarInfo(f"{key_of_clip(clip)}.{name}")
                header.size = len(content)
                self._write(header.tobuf(tarfile.USTAR_FORMAT))
                places.append((self.bytes_written, len(content), checksum(content)))
                self._write(content)
                self._write(bytes(-len(content) % _BLOCK))
            else:
                places.append((0, 0, 0))
        self._rows.append(_index_row(sample, clip, places, failed=False))

    def fail(self, sample: int, clip: PlannedClip, reason: str) -> None:
        """Note a clip that could not be encoded."""
        self._rows.append(_index_row(sample, clip, [(0, 0, 0)] * len(MEMBERS), failed=True))
        self._failures.append({"sample": sample, "row": clip.clip.row, "id": clip.clip.id, "key": key_of_clip(clip), "reason": reason})

    def finish(self) -> ShardFacts:
        """Sync and rename; the shard is finished when this returns."""
        self._write(_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        index = io.BytesIO()
        np.save(index, np.array(self._rows, dtype=INDEX))
        facts = ShardFacts(
            tar_bytes=self.bytes_written,
            tar_sha256=self._sha256.hexdigest(),
            index_sha256=hashlib.sha256(index.getvalue()).hexdigest(),
            samples=len(self._rows),
            failed=len(self._failures),
        )
        name = shard_name(self.number)
        (self.folder / f"{name}.json").unlink(missing_ok=True)  # a shard that is made again is unfinished until the end
        self._temporary.replace(self.folder / f"{name}.tar")
        write_whole(self.folder / f"{name}.index.npy", index.getvalue())
        if self._failures:
            lines = "".join(json.dumps(failure, sort_keys=True) + "\n" for failure in self._failures)
            write_whole(self.folder / f"{name}.failed.jsonl", lines.encode())
        else:
            (self.folder / f"{name}.failed.jsonl").unlink(missing_ok=True)
        write_whole(self.folder / f"{name}.json", json.dumps(asdict(facts), sort_keys=True).encode())
        return facts

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.bytes_written += len(data)


def _index_row(sample: int, clip: PlannedClip, places: Sequence[tuple[int, int, int]], *, failed: bool) -> tuple[Any, ...]:
    offsets, sizes, checksums = (list(column) for column in zip(*places, strict=True))
    shape = (clip.num_frames, clip.height, clip.width, clip.stride)
    return (sample, clip.clip.row, *shape, failed, key_of_clip(clip).encode(), offsets, sizes, checksums)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file that appears under its name only when it is whole and on disk."""
    with written_whole(path, sync=True) as temporary:
        temporary.write_bytes(content)


def remove_leftovers(folder: Path, numbers: Sequence[int]) -> int:
    """Remove hidden files that an ended writer of these shards left behind; returns how many."""
    wanted = {shard_name(number) for number in numbers}
    removed = 0
    for path in folder.glob(".shard-*.tmp*"):
        if path.name[1:].split(".")[0] in wanted and not _is_locked(path):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _is_locked(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def check_shard(folder: Path, number: int) -> ShardFacts:
    """Facts of a finished shard; its files are there and have the sizes they were written with. Opens the facts only.

    Raises:
        BadShardError: it is not finished, or not as it was written.
    """
    name = shard_name(number)
    try:
        facts = ShardFacts(**json.loads((folder / f"{name}.json").read_bytes()))
        index_size = (folder / f"{name}.index.npy").stat().st_size
        size = (folder / f"{name}.tar").stat().st_size
    except FileNotFoundError as error:
        raise BadShardError(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, TypeError) as error:
        raise BadShardError(f"{name} cannot be read: {error}") from error
    if index_size < facts.samples * INDEX.itemsize:
        raise BadShardError(f"{name}.index.npy is not as it was written")
    if size != facts.tar_bytes:
        raise BadShardError(f"{name}.tar has {size:,} bytes, it was written with {facts.tar_bytes:,}")
    return facts


def open_shard(folder: Path, number: int, *, verify: bool = False) -> tuple[ShardFacts, NDArray[Any]]:
    """Facts and index of a finished shard; sizes and the index's hash are checked, and with `verify` every byte of the tar.

    Raises:
        BadShardError: it is not finished, or not as it was written.
    """
    name = shard_name(number)
    facts = check_shard(folder, number)
    try:
        index_content = (folder / f"{name}.index.npy").read_bytes()
    except OSError as error:
        raise BadShardError(f"{name}.index.npy cannot be read: {error.strerror}") from error
    if hashlib.sha256(index_content).hexdigest() != facts.index_sha256:
        raise BadShardError(f"{name}.index.npy is not as it was written")
    if verify:
        with (folder / f"{name}.tar").open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts.tar_sha256:
                raise BadShardError(f"{name}.tar is not as it was written (SHA-256)")
    with _ONE_PARSER:
        index: NDArray[Any] = np.load(io.BytesIO(index_content), allow_pickle=False)
    if index.dtype != INDEX:
        raise BadShardError(f"{name}.index.npy has other columns than this version writes")
    return facts, index


def failure_reasons(folder: Path, number: int) -> dict[int, str]:
    """Sample -> why it failed when the shard was written."""
    path = folder / f"{shard_name(number)}.failed.jsonl"
    try:
        return {record["sample"]: str(record["reason"]) for record in map(json.loads, path.read_text().splitlines())}
    except (OSError, ValueError, KeyError) as error:
        raise BadSampleError(f"{path.name} is missing or unreadable ({error})") from error

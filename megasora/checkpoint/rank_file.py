"""One rank's data file of a checkpoint: tensors one after the other as torch.save archives, hashed while they are written.

What Megatron's and torch's writers put into a `.distcp` file (torch/distributed/checkpoint/filesystem.py, _write_item), without their
processes and queues. The archives' CRC is left out: every file has a SHA-256 in the manifest, which is checked before anything is read.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

CHUNK_BYTES = 16 << 20
"""Hashed and written at once, so that a cancelled write ends soon."""


@dataclass(frozen=True, kw_only=True)
class RankFile:
    """A data file that is on disk.

    Attributes:
        name: within the checkpoint.
        num_bytes: its size.
        sha256: of all its bytes.
        lengths: bytes of each archive, in the order of the tensors; they lie one after the other.
    """

    name: str
    num_bytes: int
    sha256: str
    lengths: tuple[int, ...]


class CancelledError(Exception):
    """The write was told to stop."""


class HashingFile:
    """A new file that hashes what it is given.

    An error is kept in `error` and the rest swallowed: torch's archive writer calls back from C++, which must not see exceptions.
    """

    def __init__(self, path: Path, *, cancelled: threading.Event) -> None:
        self.size = 0
        self.error: Exception | None = None
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._cancelled = cancelled

    def write(self, data: Any) -> int:
        """Append bytes."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK_BYTES):
            if self.error is None:
                self._append(view[start : start + CHUNK_BYTES])
        return len(view)

    def _append(self, part: memoryview) -> None:
        try:
            if self._cancelled.is_set():
                raise CancelledError
            self._hash.update(part)
            self._file.write(part)
            self.size += len(part)
        except (OSError, CancelledError) as error:
            self.error = error

    def flush(self) -> None:
        """Asked for by torch.save; `finish` does it."""

    def finish(self) -> str:
        """Wait until everything is on disk; the hash.

        Raises:
            OSError: something could not be written.
            CancelledError: the write was told to stop.
        """
        try:
            if self.error is not None:
                raise self.error
            self._file.flush()
            os.fsync(self._file.fileno())
            return self._hash.hexdigest()
        finally:
            with suppress(OSError):  # what is left in its buffer fails again
                self._file.close()


def write_rank_file(path: Path, tensors: Sequence[Tensor], *, cancelled: threading.Event) -> RankFile:
    """Write tensors that each own their storage; returns when they are on disk.

    Raises:
        OSError: the disk is full, read-only or gone.
        CancelledError: `cancelled` was set.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    lengths = []
    try:
        file = HashingFile(path, cancelled=cancelled)
        for tensor in tensors:
            start = file.size
            torch.save(tensor, cast(IO[bytes], file))  # it asks for write and flush
            lengths.append(file.size - start)
            if file.error is not None:
                break
        digest = file.finish()
    finally:
        torch.serialization.set_crc32_options(before)
    return RankFile(name=path.name, num_bytes=file.size, sha256=digest, lengths=tuple(lengths))

"""A cache opened for training: every shard checked, planned clips found in it, samples read by offset and ahead of the step."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megasora.config.errors import UserError
from megasora.data.cache.identity import CacheFacts, read_facts
from megasora.data.cache.shards import BadSampleError, BadShardError, checksum, failure_reasons, open_shard, shard_name, tensors_in
from megasora.data.plan import PlannedClip

_OPEN_FILES = 256
"""Shards kept open at once by a process."""
_OPEN_THREADS = 8

Stored = dict[str, Tensor] | BadSampleError
"""Tensors of a sample by name, or why there are none."""


class _OpenFile:
    """A file descriptor that is closed when its last reader lets go."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Cache:
    """Random access to the samples of a finished cache; threads may share it.

    Args:
        folder: of the cache.
        facts: its cache.json.
        indices: index of every shard, in order.
    """

    def __init__(self, folder: Path, *, facts: CacheFacts, indices: Sequence[NDArray[Any]]) -> None:
        self.folder, self.facts = folder, facts
        index = np.concatenate(indices)
        self.samples: NDArray[np.int64] = index["sample"]
        self._shards = np.repeat(np.arange(len(indices)), [len(part) for part in indices])
        self._failed, self._offsets, self._bytes, self._checksums = (index[name] for name in ("failed", "offset", "bytes", "checksum"))
        self._rows: NDArray[np.int64] = index["row"]
        self._shapes = _packed_shapes(*(index[name] for name in ("num_frames", "height", "width", "stride")))
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._open_shard)
        self._reasons = lru_cache(maxsize=_OPEN_FILES)(lambda shard: failure_reasons(folder, shard))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_failed(self) -> int:
        """Samples that could not be encoded."""
        return int(self._failed.sum())

    def places_of(self, clips: Sequence[PlannedClip]) -> NDArray[np.int64]:
        """Place in the cache of each planned clip.

        Raises:
            UserError: a clip, in the shape it trains at, is not there.
        """
        rows = np.array([clip.clip.row for clip in clips])
        shapes = _packed_shapes(
            *(np.array([getattr(clip, name) for clip in clips]) for name in ("num_frames", "height", "width", "stride"))
        )
        _, shape_numbers = np.unique(np.concatenate([self._shapes, shapes]), return_inverse=True)
        # (row, number of the shape) as one integer; there are few shapes
        keys = np.concatenate([self._rows, rows]) * (int(shape_numbers.max()) + 1) + shape_numbers
        stored, wanted = keys[: len(self)], keys[len(self) :]
        order = np.argsort(stored)
        places = order[np.searchsorted(stored, wanted, sorter=order).clip(max=len(self) - 1)]
        absent = np.flatnonzero(stored[places] != wanted)
        if len(absent):
            clip = clips[int(absent[0])]
            raise UserError(
                f"{len(absent):,} of {len(clips):,} planned clips are not in the cache {self.folder}, the first row {clip.clip.row} at "
                f"{clip.num_frames} x {clip.height} x {clip.width}; train with the data settings it was encoded with, or encode again"
            )
        return places

    def read(self, place: int, members: slice) -> dict[str, Tensor]:
        """Tensors of a sample, in one read; they share one buffer.

        Args:
            place: of the sample in the cache.
            members: range of shards.MEMBERS: 0 latents, 1 text.

        Raises:
            BadSampleError: it failed when it was encoded, or its bytes are not those that were written.
        """
        shard = int(self._shards[place])
        if self._failed[place]:
            sample = int(self.samples[place])
            raise BadSampleError(f"failed when it was encoded: {self._reasons(shard).get(sample, 'no reason is recorded')}")
        buffer, found = self.read_bytes(place, members)
        tensors: dict[str, Tensor] = {}
        for start, size, expected in found:
            if checksum(buffer[start : start + size]) != expected:
                raise BadSampleError(f"row {self._rows[place]} in {shard_name(shard)}.tar is damaged (checksum); encode that shard again")
            tensors.update(tensors_in(buffer, start, size))
        return tensors

    def read_bytes(self, place: int, members: slice) -> tuple[NDArray[np.uint8], list[tuple[int, int, int]]]:
        """(buffer, (start in it, bytes, checksum) of each member) of a sample, not checked.

        Raises:
            BadSampleError: the shard is shorter than its index says, or cannot be read.
        """
        shard = int(self._shards[place])
        offsets, sizes = self._offsets[place, members].tolist(), self._bytes[place, members].tolist()
        checksums = self._checksums[place, members].tolist()
        first, total = offsets[0], offsets[-1] + sizes[-1] - offsets[0]
        buffer = np.empty(total, np.uint8)
        try:
            file, done = self._open(shard), 0
            while done < total:  # a read returns at most 2 GiB
                count = os.preadv(file.descriptor, [buffer[done:].data], first + done)
                if count == 0:
                    raise BadSampleError(f"row {self._rows[place]}: {shard_name(shard)}.tar ends early")
                done += count
        except OSError as error:
            raise BadSampleError(f"row {self._rows[place]}: {shard_name(shard)}.tar: {error.strerror}") from error
        return buffer, [(offset - first, size, known) for offset, size, known in zip(offsets, sizes, checksums, strict=True)]

    def _open_shard(self, shard: int) -> _OpenFile:
        return _OpenFile(self.folder / f"{shard_name(shard)}.tar")


def _packed_shapes(num_frames: NDArray[Any], height: NDArray[Any], width: NDArray[Any], stride: NDArray[Any]) -> NDArray[np.uint64]:
    """The four numbers of each clip, 16 bits each."""
    columns = [column.astype(np.uint64) for column in (num_frames, height, width, stride)]
    assert all(int(column.max(initial=0)) < 1 << 16 for column in columns), "frames, sizes and strides are below 65,536"
    packed: NDArray[np.uint64] = columns[0] << np.uint64(48) | columns[1] << np.uint64(32) | columns[2] << np.uint64(16) | columns[3]
    return packed


def open_cache(folder: Path) -> Cache:
    """Open a cache whose every shard is finished; sizes and indices are checked, contents when they are read.

    Raises:
        UserError: it is no cache, or shards are missing or damaged.
    """
    facts = read_facts(folder)
    numbers = range(facts.settings.num_shards)

    def index_of(number: int) -> NDArray[Any] | str:
        try:
            return open_shard(folder, number)[1]
        except BadShardError as error:
            return str(error)

    with ThreadPoolExecutor(_OPEN_THREADS) as pool:
        opened = list(pool.map(index_of, numbers))
    bad = {number: part for number, part in zip(numbers, opened, strict=True) if isinstance(part, str)}
    if bad:
        first = next(iter(bad.values()))
        raise UserError(
            f"cache {folder} lacks {len(bad)} of its {len(numbers)} shards ({_ranges(list(bad))}; {first}); "
            f"run megasora data encode again with the same settings, it makes what is missing"
        )
    return Cache(folder, facts=facts, indices=[part for part in opened if not isinstance(part, str)])


def _ranges(numbers: list[int]) -> str:
    """'0-3, 7, 9 ...' of ascending numbers."""
    values = np.array(numbers)
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(texts[:5]) + (" ..." if len(texts) > 5 else "")


@dataclass(frozen=True, kw_only=True)
class ReadStep:
    """The samples of one step, in the order asked for."""

    samples: tuple[Stored, ...]
    wait_s: float
    """Time the caller waited for them."""


class CacheLoader:
    """Reads the samples of coming steps in threads, ahead of the training loop.

    Args:
        cache: where they are.
        steps: places in the cache of each coming step (this rank's share).
        members: what of each sample is read, see `Cache.read`.
        workers: reading threads.
        ahead: steps read before they are asked for.
        timeout_s: longest wait for one sample.
    """

    def __init__(self, cache: Cache, steps: Iterator[Sequence[int]], *, members: slice, workers: int, ahead: int, timeout_s: float) -> None:
        self._cache, self._steps, self._members = cache, steps, members
        self._ahead, self._timeout_s = max(1, ahead), timeout_s
        self._pool = ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="read")
        self._queue: deque[list[Future[Stored]]] = deque()

    def __iter__(self) -> Iterator[ReadStep]:
        """Steps in order; ends with the iterator of places."""
        while True:
            self._fill()
            if not self._queue:
                return
            futures = self._queue.popleft()
            started = time.perf_counter()
            samples = tuple(self._result(future) for future in futures)
            yield ReadStep(samples=samples, wait_s=time.perf_counter() - started)

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self) -> None:
        while len(self._queue) < self._ahead:
            places = next(self._steps, None)
            if places is None:
                return
            self._queue.append([self._pool.submit(self._read, place) for place in places])

    def _read(self, place: int) -> Stored:
        try:
            return self._cache.read(place, self._members)
        except BadSampleError as error:
            return error

    def _result(self, future: Future[Stored]) -> Stored:
        try:
            return future.result(timeout=self._timeout_s)
        except FutureTimeoutError:
            return BadSampleError(f"reading took longer than {self._timeout_s:g} s")

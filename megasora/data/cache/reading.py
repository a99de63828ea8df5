"""A cache opened for training: planned clips found in it, samples read by offset and ahead of the step.

A sample's place in the cache is its number among the clips that were planned when it was encoded, so shard and row in the shard's index
follow from it, and an index is opened when the first of its samples is read.
"""

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
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megasora.config.errors import UserError
from megasora.data.cache.identity import CacheFacts, read_facts
from megasora.data.cache.shards import (
    BadSampleError,
    BadShardError,
    check_shard,
    checksum,
    failure_reasons,
    open_shard,
    shard_name,
    tensors_in,
)
from megasora.data.plan import PlannedClip

_OPEN_FILES = 256
"""Shards kept open at once by a process."""
_OPEN_THREADS = 8
_SHAPE = ("num_frames", "height", "width", "stride")

Stored = dict[str, Tensor] | BadSampleError
"""Tensors of a sample by name, or why there are none."""


class _OpenFile:
    """A file descriptor that is closed when its last reader lets go."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardedSettings(Protocol):
    """How many samples lie in which shards."""

    @property
    def samples(self) -> int:
        """Planned clips."""
        ...

    @property
    def samples_per_shard(self) -> int:
        """The last shard may have fewer."""
        ...

    @property
    def num_shards(self) -> int:
        """Of the whole cache."""
        ...


class Sharded(Protocol):
    """What any cache.json says."""

    @property
    def settings(self) -> ShardedSettings:
        """What decides its content."""
        ...


Facts = TypeVar("Facts", bound=Sharded)


class Cache(Generic[Facts]):
    """Random access to the samples of a finished cache; threads may share it.

    Args:
        folder: of the cache.
        facts: its cache.json.
    """

    def __init__(self, folder: Path, *, facts: Facts) -> None:
        self.folder, self.facts = folder, facts
        self._claimed: _Keys | None = None
        """What places 0, 1, ... hold according to a run's plan; compared with each index that is opened."""
        self._index = lru_cache(maxsize=None)(self._open_index)
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._open_shard)
        self._reasons = lru_cache(maxsize=_OPEN_FILES)(lambda shard: failure_reasons(folder, shard))

    def __len__(self) -> int:
        return self.facts.settings.samples

    def places_of(self, clips: Sequence[PlannedClip]) -> NDArray[np.int64]:
        """Place in the cache of each planned clip.

        A run with the cache's settings plans the cache's clips, in its order, save those above its token limits; a lower limit only leaves
        clips out. So as many clips are the same clips, and no index is opened now. Otherwise all are, and the clips are looked up.

        Raises:
            UserError: a clip, in the shape it trains at, is not there.
        """
        wanted = _Keys.of_clips(clips)
        if len(clips) == len(self) and bool(np.all(wanted.rows[1:] >= wanted.rows[:-1])):
            self._claimed = wanted
            return np.arange(len(clips))
        return self._looked_up(clips, wanted)

    def _looked_up(self, clips: Sequence[PlannedClip], wanted: _Keys) -> NDArray[np.int64]:
        try:
            with ThreadPoolExecutor(_OPEN_THREADS) as pool:
                index = np.concatenate(list(pool.map(self._index, range(self.facts.settings.num_shards))))
        except BadShardError as error:
            raise UserError(f"cache {self.folder}: {error}; run megasora data encode again with the same settings") from error
        stored = _Keys.of_index(index)
        _, shape_numbers = np.unique(np.concatenate([stored.shapes, wanted.shapes]), return_inverse=True)
        # (row, number of the shape) as one integer; there are few shapes
        keys = np.concatenate([stored.rows, wanted.rows]) * (int(shape_numbers.max()) + 1) + shape_numbers
        there, sought = keys[: len(self)], keys[len(self) :]
        order = np.argsort(there)
        places = order[np.searchsorted(there, sought, sorter=order).clip(max=len(self) - 1)]
        absent = np.flatnonzero(there[places] != sought)
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
        shard, entry = self._entry(place)
        if entry["failed"]:
            raise BadSampleError(f"failed when it was encoded: {self._reasons(shard).get(place, 'no reason is recorded')}")
        buffer, found = self.read_bytes(place, members)
        tensors: dict[str, Tensor] = {}
        for start, size, expected in found:
            if checksum(buffer[start : start + size]) != expected:
                raise BadSampleError(f"row {entry['row']} in {shard_name(shard)}.tar is damaged (checksum); encode that shard again")
            tensors.update(tensors_in(buffer, start, size))
        return tensors

    def read_bytes(self, place: int, members: slice) -> tuple[NDArray[np.uint8], list[tuple[int, int, int]]]:
        """(buffer, (start in it, bytes, checksum) of each member) of a sample, not checked.

        Raises:
            BadSampleError: the shard is shorter than its index says, or cannot be read.
        """
        shard, entry = self._entry(place)
        offsets, sizes, checksums = (entry[name][members].tolist() for name in ("offset", "bytes", "checksum"))
        first, total = offsets[0], offsets[-1] + sizes[-1] - offsets[0]
        buffer = np.empty(total, np.uint8)
        try:
            file, done = self._open(shard), 0
            while done < total:  # a read returns at most 2 GiB
                count = os.preadv(file.descriptor, [buffer[done:].data], first + done)
                if count == 0:
                    raise BadSampleError(f"row {entry['row']}: {shard_name(shard)}.tar ends early")
                done += count
        except OSError as error:
            raise BadSampleError(f"row {entry['row']}: {shard_name(shard)}.tar: {error.strerror}") from error
        return buffer, [(offset - first, size, known) for offset, size, known in zip(offsets, sizes, checksums, strict=True)]

    def _entry(self, place: int) -> tuple[int, Any]:
        """(shard, row of its index) of a sample.

        Raises:
            BadSampleError: the shard is not as it was written, or holds other clips than the run planned.
        """
        shard, number = divmod(place, self.facts.settings.samples_per_shard)
        try:
            return shard, self._index(shard)[number]
        except BadShardError as error:
            raise BadSampleError(f"{error}; encode that shard again") from error

    def _open_index(self, shard: int) -> NDArray[Any]:
        index = open_shard(self.folder, shard)[1]
        settings = self.facts.settings
        first = shard * settings.samples_per_shard
        places = np.arange(first, min(first + settings.samples_per_shard, settings.samples))
        if not np.array_equal(index["sample"], places):
            raise BadShardError(f"{shard_name(shard)}.index.npy lists other samples than {first} to {int(places[-1])}")
        if self._claimed is not None and not self._claimed.at(places).same_as(_Keys.of_index(index)):
            raise BadShardError(f"{shard_name(shard)} holds other clips, or other shapes of them, than this version plans")
        return index

    def _open_shard(self, shard: int) -> _OpenFile:
        return _OpenFile(self.folder / f"{shard_name(shard)}.tar")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Keys:
    """Which clips, at which shapes."""

    rows: NDArray[np.int64]
    """Of the manifest."""
    shapes: NDArray[np.uint64]
    """Frames, height, width and stride of each clip, 16 bits each."""

    @classmethod
    def of_clips(cls, clips: Sequence[PlannedClip]) -> _Keys:
        rows = np.array([clip.clip.row for clip in clips])
        return cls(rows=rows, shapes=_packed_shapes(*(np.array([getattr(clip, name) for clip in clips]) for name in _SHAPE)))

    @classmethod
    def of_index(cls, index: NDArray[Any]) -> _Keys:
        return cls(rows=index["row"], shapes=_packed_shapes(*(index[name] for name in _SHAPE)))

    def at(self, places: NDArray[np.int64]) -> _Keys:
        return _Keys(rows=self.rows[places], shapes=self.shapes[places])

    def same_as(self, other: _Keys) -> bool:
        return np.array_equal(self.rows, other.rows) and np.array_equal(self.shapes, other.shapes)


def _packed_shapes(num_frames: NDArray[Any], height: NDArray[Any], width: NDArray[Any], stride: NDArray[Any]) -> NDArray[np.uint64]:
    columns = [column.astype(np.uint64) for column in (num_frames, height, width, stride)]
    assert all(int(column.max(initial=0)) < 1 << 16 for column in columns), "frames, sizes and strides are below 65,536"
    packed: NDArray[np.uint64] = columns[0] << np.uint64(48) | columns[1] << np.uint64(32) | columns[2] << np.uint64(16) | columns[3]
    return packed


def refuse_incomplete(folder: Path, facts: Sharded) -> None:
    """Refuse a cache some of whose shards are not finished. Looks at every shard's facts and the sizes of its files; opens no index.

    Raises:
        UserError: names the shards.
    """
    numbers = range(facts.settings.num_shards)

    def problem_of(number: int) -> str | None:
        try:
            check_shard(folder, number)
        except BadShardError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_OPEN_THREADS) as pool:
        problems = list(pool.map(problem_of, numbers))
    bad = {number: problem for number, problem in zip(numbers, problems, strict=True) if problem is not None}
    if bad:
        first = next(iter(bad.values()))
        raise UserError(
            f"cache {folder} lacks {len(bad)} of its {len(numbers)} shards ({_ranges(list(bad))}; {first}); "
            f"run megasora data encode again with the same settings, it makes what is missing"
        )


def open_cache(folder: Path) -> Cache[CacheFacts]:
    """Open a cache whose every shard is finished; an index is checked when it is opened, contents when they are read.

    Raises:
        UserError: it is no cache, or shards are missing or cut off.
    """
    facts = read_facts(folder)
    refuse_incomplete(folder, facts)
    return Cache(folder, facts=facts)


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

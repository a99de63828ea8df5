"""One item ahead: an iterator whose next item a thread makes, on a CUDA stream of its own, while the last one is used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


class _Made(NamedTuple, Generic[Item]):
    items: tuple[Item, ...]
    """The item, or nothing at the end."""
    ready: torch.cuda.Event | None
    """When the device has made it; None on the CPU, where it has been."""


class Ahead(Generic[Item]):
    """Items of an iterator in order, the next one under way.

    The thread starts with the first item asked for and has begun at most one item more than were taken. What its tensors are used for waits
    on the device for the thread's stream, never on the host, and their memory is kept until the user's stream is through with them. An
    error of the iterator is raised where its item would have come.

    Args:
        items: asked for by the thread alone, so it needs no lock; no collective in it, for two threads would start those of a group in
            an order of their own on each rank.
        tensors: tensors of an item that the thread made.
        device: where they are.
    """

    def __init__(self, items: Iterator[Item], *, tensors: Callable[[Item], Iterable[Tensor]], device: torch.device) -> None:
        self._items, self._tensors, self._device = items, tensors, device
        self._on_cuda = device.type == "cuda"
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead", initializer=self._enter_thread)
        self._next: Future[_Made[Item]] | None = None
        self._stream: torch.cuda.Stream | None = None
        self.wait_s = 0.0
        """Time the caller waited for the last item."""

    def __iter__(self) -> Iterator[Item]:
        """Each item, after the next one was begun."""
        if self._on_cuda:
            self._stream = torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # whose work the iterator may build on: weights
        self._next = self._pool.submit(self._make)
        while True:
            started = time.perf_counter()
            made = self._next.result()
            self.wait_s = time.perf_counter() - started
            if not made.items:
                return
            (item,) = made.items
            self._take(item, made.ready)
            self._next = self._pool.submit(self._make)
            del made
            yield item

    def settle(self) -> None:
        """Wait until the thread has nothing to do: what it uses is free until the next item is taken."""
        if self._next is not None:
            wait([self._next])
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def close(self) -> None:
        """End the thread, after the item it is at."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _enter_thread(self) -> None:
        if self._on_cuda:
            torch.cuda.set_device(self._device)  # a new thread's device is the first

    def _make(self) -> _Made[Item]:
        on_stream: AbstractContextManager[object] = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with on_stream:
            items = tuple(_first(self._items))
            return _Made(items, None if self._stream is None else self._stream.record_event())

    def _take(self, item: Item, ready: torch.cuda.Event | None) -> None:
        """Let the caller's stream wait for the item, and the allocator for the caller's stream."""
        if ready is None:
            return
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(ready)
        for tensor in self._tensors(item):
            tensor.record_stream(stream)


def _first(items: Iterator[Item]) -> Iterator[Item]:
    """The next item, or nothing."""
    for item in items:
        yield item
        return

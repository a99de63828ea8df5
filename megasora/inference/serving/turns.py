"""Calls of many threads, made one after another in one: torch's modes and CUDA's current device belong to the thread that set them."""

from __future__ import annotations

import contextvars
import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Turns:
    """Brings calls to the thread that works."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()

    def take(self, call: Callable[[], T]) -> T:
        """What the call returns or raises in the working thread, in the caller's context (gradio knows by it whose progress is shown)."""
        future: Future[T] = Future()
        context = contextvars.copy_context()
        self._calls.put((lambda: context.run(call), future))
        return future.result()

    def work(self) -> None:
        """Make the calls of other threads until `end` or an interruption."""
        while (turn := self._calls.get()) is not None:
            call, future = turn
            try:
                future.set_result(call())
            except Exception as error:  # noqa: BLE001 (handed to the thread that waits)
                future.set_exception(error)

    def end(self) -> None:
        """Let `work` return after the calls that wait."""
        self._calls.put(None)

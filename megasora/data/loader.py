"""Decodes the clips of coming steps in threads, ahead of the training loop, and says how long the loop had to wait.

A clip that fails or takes too long comes back as its error; the loop gives it weight 0 and goes on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

from torch import Tensor

from megasora.data.decode import DecodeError, Decoder, DecodeRequest

Decoded = Tensor | DecodeError


@dataclass(frozen=True, kw_only=True)
class LoadedStep:
    """The clips of one step, in the order asked for."""

    clips: tuple[Decoded, ...]
    wait_s: float
    """Time the caller waited for them."""


class ClipLoader:
    """Runs a decoder ahead of its reader.

    Args:
        steps: requests of each coming step (this rank's share).
        decoder: the run's decoder; with more than one worker it must be safe to share between threads.
        workers: decoding threads.
        ahead: steps decoded before they are asked for.
        timeout_s: longest time to wait for one clip.
    """

    def __init__(
        self, steps: Iterator[Sequence[DecodeRequest]], *, decoder: Decoder, workers: int, ahead: int, timeout_s: float = 120.0
    ) -> None:
        self._steps = steps
        self._decoder = decoder
        self._pool = ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="decode")
        self._queue: deque[list[Future[Decoded]]] = deque()
        self._ahead = max(1, ahead)
        self._timeout_s = timeout_s

    def __iter__(self) -> Iterator[LoadedStep]:
        """Steps in order; ends with the iterator of requests."""
        while True:
            self._fill()
            if not self._queue:
                return
            futures = self._queue.popleft()
            started = time.perf_counter()
            clips = tuple(self._result(future) for future in futures)
            yield LoadedStep(clips=clips, wait_s=time.perf_counter() - started)

    def close(self) -> None:
        """Stop decoding; running clips are left to end on their own."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self) -> None:
        while len(self._queue) < self._ahead:
            requests = next(self._steps, None)
            if requests is None:
                return
            self._queue.append([self._pool.submit(self._decode, request) for request in requests])

    def _decode(self, request: DecodeRequest) -> Decoded:
        try:
            return self._decoder.decode(request)
        except DecodeError as error:
            return error
        except Exception as error:  # noqa: BLE001 (a decoder's own bug on a strange file costs that clip, not the run)
            return DecodeError(f"{request.path}: {type(error).__name__}: {error}")

    def _result(self, future: Future[Decoded]) -> Decoded:
        try:
            return future.result(timeout=self._timeout_s)
        except FutureTimeoutError:
            return DecodeError(f"decoding took longer than {self._timeout_s:g} s")

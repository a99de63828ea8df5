"""Decodes the clips of coming steps in threads, ahead of the training loop, and says how long the loop had to wait.

A clip that fails or takes too long comes back as its error; the loop gives it weight 0 and goes on. A thread that hangs in a file is given
up and another takes its place, so that hanging files cost no capacity.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megasora.data.decoding.contract import DECODE_TIMEOUT_S, BatchDecoder, Decoded, DecodeError, Decoder, DecodeRequest, normalise
from megasora.data.quarantine import Quarantine

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedStep:
    """The clips of one step, in the order asked for."""

    clips: tuple[Decoded, ...]
    wait_s: float
    """Time the caller waited for them."""
    frames: int = 0
    """Frames of the clips that came; frames decoded on the way to them are not counted."""
    decode_s: float = 0.0
    """Time threads spent on these clips, summed over threads, so frames / decode_s is the rate of one thread."""
    pixel_bytes: int = 0
    """Size of the clips that came."""


@dataclass(eq=False)
class _Task:
    request: DecodeRequest
    result: Decoded | None = None
    seconds: float = 0.0


@dataclass(eq=False)
class _Work:
    """Tasks a thread has taken together."""

    tasks: list[_Task]
    given_up: bool = False
    started: float = field(default_factory=time.perf_counter)


class ClipLoader:
    """Runs a decoder ahead of its reader.

    Args:
        steps: requests of each coming step (this rank's share).
        decoder: the run's decoder; with more than one worker it must be safe to share between threads.
        workers: decoding threads.
        ahead: steps decoded before they are asked for.
        timeout_s: longest time one clip may take.
        give: `float` clips are fp32 in [-1, 1]; `pixels` are uint8, a quarter of the memory, for `decode.normalise` on the device.
        quarantine: clips that are not to be tried; it is told of failures.
    """

    def __init__(
        self,
        steps: Iterator[Sequence[DecodeRequest]],
        *,
        decoder: Decoder,
        workers: int,
        ahead: int,
        timeout_s: float = DECODE_TIMEOUT_S,
        give: Literal["float", "pixels"] = "float",
        quarantine: Quarantine | None = None,
    ) -> None:
        self._steps = steps
        self._decoder = decoder
        self._batches = decoder if isinstance(decoder, BatchDecoder) else None
        self._batch_size = max(1, self._batches.batch_size) if self._batches is not None else 1
        self._ahead = max(1, ahead)
        self._timeout_s = timeout_s
        self._give = give
        self._quarantine = quarantine
        self._queue: deque[list[_Task]] = deque()
        self._changed = threading.Condition()
        """Guards what follows, and the results of tasks."""
        self._waiting: deque[_Task] = deque()
        self._running: list[_Work] = []
        self._closed = False
        self._stuck_threads = 0
        for _ in range(max(1, workers)):
            self._start_thread()

    @property
    def stuck_threads(self) -> int:
        """Threads given up so far because a file hung."""
        return self._stuck_threads

    def __iter__(self) -> Iterator[LoadedStep]:
        """Steps in order; ends with the iterator of requests."""
        while True:
            self._fill()
            if not self._queue:
                self.close()
                return
            yield self._loaded(self._queue.popleft())  # nothing here keeps the clips while the next step is waited for

    def close(self) -> None:
        """Stop decoding; running clips are left to end on their own."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _fill(self) -> None:
        while len(self._queue) < self._ahead:
            requests = next(self._steps, None)
            if requests is None:
                return
            tasks = [_Task(request, result=self._refusal(request)) for request in requests]
            self._queue.append(tasks)
            with self._changed:
                self._waiting.extend(task for task in tasks if task.result is None)
                self._changed.notify_all()

    def _refusal(self, request: DecodeRequest) -> DecodeError | None:
        reason = self._quarantine.reason(request.clip_id) if self._quarantine is not None else None
        return None if reason is None else DecodeError(f"{request.path}: {reason}")

    def _loaded(self, tasks: Sequence[_Task]) -> LoadedStep:
        started = time.perf_counter()
        clips = tuple(self._result(task) for task in tasks)
        wait_s = time.perf_counter() - started
        videos = [clip for clip in clips if not isinstance(clip, DecodeError)]
        return LoadedStep(
            clips=clips,
            wait_s=wait_s,
            frames=sum(video.shape[1] for video in videos),
            decode_s=sum(task.seconds for task in tasks),
            pixel_bytes=sum(video.nbytes for video in videos),
        )

    def _start_thread(self) -> None:
        # a daemon, for a thread that hangs in the kernel must not keep the process from ending
        threading.Thread(target=self._run, name="decode", daemon=True).start()

    def _run(self) -> None:
        while self._serve():
            pass

    def _serve(self) -> bool:
        """Decode what is next; False when this thread is to end. A function of its own, so that a waiting thread holds no clip."""
        work = self._take()
        if work is None:
            return False
        results = self._decode([task.request for task in work.tasks])
        with self._changed:
            if work.given_up:  # another thread stands in for this one
                return False
            self._finish(work, results)
        self._report(work.tasks, results)
        return True

    def _report(self, tasks: Sequence[_Task], results: Sequence[Decoded]) -> None:
        if self._quarantine is not None:
            for task, result in zip(tasks, results, strict=True):
                if isinstance(result, DecodeError):
                    self._quarantine.failed(task.request.clip_id, str(result))

    def _take(self) -> _Work | None:
        """The next tasks, as many as the decoder works on together; None when the loader is closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            work = _Work([self._waiting.popleft() for _ in range(min(self._batch_size, len(self._waiting)))])
            self._running.append(work)
            return work

    def _finish(self, work: _Work, results: Sequence[Decoded]) -> None:
        seconds = (time.perf_counter() - work.started) / len(work.tasks)
        for task, result in zip(work.tasks, results, strict=True):
            task.result, task.seconds = result, seconds
        self._running.remove(work)
        self._changed.notify_all()

    def _decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        try:
            if self._batches is None:
                return [self._decoder.decode(request) if self._give == "float" else self._decoder.pixels(request) for request in requests]
            results = self._batches.pixels_many(requests)
            if self._give == "pixels":
                return results
            return [result if isinstance(result, DecodeError) else normalise(result) for result in results]
        except DecodeError as error:
            return [error] * len(requests)
        except Exception as error:  # noqa: BLE001 (a decoder's own bug on a strange file costs that clip, not the run)
            return [DecodeError(f"{request.path}: {type(error).__name__}: {error}") for request in requests]

    def _result(self, task: _Task) -> Decoded:
        with self._changed:
            while task.result is None:
                if self._closed:
                    return DecodeError(f"{task.request.path}: the loader was closed")
                self._give_up_stuck()
                if task.result is None:
                    self._changed.wait(timeout=self._time_left())
            return task.result

    def _limit(self, work: _Work) -> float:
        return self._timeout_s * len(work.tasks)

    def _time_left(self) -> float:
        """Until the next running work is over its time."""
        now = time.perf_counter()
        return max(0.0, min((work.started + self._limit(work) - now for work in self._running), default=self._timeout_s))

    def _give_up_stuck(self) -> None:
        for work in [work for work in self._running if time.perf_counter() - work.started > self._limit(work)]:
            work.given_up = True
            paths = [task.request.path for task in work.tasks]
            late: list[Decoded] = [DecodeError(f"{path}: decoding took longer than {self._timeout_s:g} s") for path in paths]
            self._report(work.tasks, late)
            self._finish(work, late)
            self._stuck_threads += 1
            self._start_thread()
            if self._stuck_threads == 1:
                logger.warning(
                    "decoding %s took longer than %g s: the clip is skipped and its thread replaced (said once; later ones are counted)",
                    ", ".join(paths),
                    self._timeout_s,
                )


def decoded_ahead(
    requests: Iterable[DecodeRequest], *, decoder: Decoder, workers: int, ahead: int, timeout_s: float = DECODE_TIMEOUT_S
) -> Generator[Decoded, None, None]:
    """Each clip as uint8 pixels, or why there is none, in order; coming ones are decoded meanwhile. Close it to stop the threads.

    Args:
        requests: one for each clip.
        decoder, workers, timeout_s: see `ClipLoader`.
        ahead: clips decoded before they are asked for.
    """
    steps = ([request] for request in requests)
    loader = ClipLoader(steps, decoder=decoder, workers=workers, ahead=ahead, timeout_s=timeout_s, give="pixels")
    try:
        for step in loader:
            yield step.clips[0]
    finally:
        loader.close()

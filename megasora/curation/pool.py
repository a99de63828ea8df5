"""Runs a function over rows in worker processes that can be killed, or on a Ray cluster; a bad file costs its own row.

A worker that hangs is killed at the time limit, one that grows too large gets MemoryError (or dies) at the memory limit, one that crashes
is replaced. In each case the row comes back with the reason and the others go on. Results come in the order they are ready; who needs an
order sorts. Ray's workers keep the same limits: each holds such a process of its own.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from types import TracebackType
from typing import Any

from pebble import ProcessExpired, ProcessPool

from megasora.config.errors import UserError
from megasora.curation.settings import Limits

Row = dict[str, Any]
Work = Callable[[Row], list[Row]]
"""Takes a row, returns rows; picklable. UserError ends the run, any other exception costs the row."""

_WAITING_PER_WORKER = 4
"""Rows handed over ahead of each worker: enough that none waits, few enough that millions of rows are never held."""
_RAY_BLOCK = 8
"""Rows of a Ray message: a score takes a second or so, a message a millisecond."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one row."""

    key: str
    rows: tuple[Row, ...]
    """Results; empty when it failed."""
    reason: str = ""
    """Why it failed; empty when it did not."""


class LocalPool:
    """Worker processes on this machine. Use as a context manager; leaving it kills what still runs."""

    def __init__(self, work: Work, limits: Limits) -> None:
        self._work, self._limits = work, limits
        self._size = limits.workers or len(os.sched_getaffinity(0))
        # spawned, not forked: the parent may hold threads (Ray, Arrow) that a fork would copy half of
        self._pool = ProcessPool(
            max_workers=self._size,
            initializer=_begin_worker,
            initargs=(int(limits.memory_gb * 1e9),),
            context=multiprocessing.get_context("spawn"),
        )

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._pool.close()
        else:
            self._pool.stop()
        self._pool.join()

    def outcomes(self, rows: Iterable[tuple[str, Row]]) -> Iterator[Outcome]:
        """Outcomes of (key, row) pairs, in the order they are ready.

        Raises:
            UserError: raised by the work itself: a mistake that every row would repeat.
        """
        source = iter(rows)
        running: dict[Future[list[Row]], str] = {}
        while True:
            for key, row in islice(source, self._size * _WAITING_PER_WORKER - len(running)):
                running[self._pool.schedule(self._work, args=(row,), timeout=self._limits.timeout_s)] = key
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield self._outcome(running.pop(future), future)

    def _outcome(self, key: str, future: Future[list[Row]]) -> Outcome:
        try:
            return Outcome(key=key, rows=tuple(future.result()))
        except UserError:
            raise
        except TimeoutError:
            reason = f"took longer than {self._limits.timeout_s:g} s"
        except MemoryError:
            reason = f"needed more than {self._limits.memory_gb:g} GB of memory"
        except ProcessExpired as error:
            reason = f"ended the worker process ({_exit_words(error.exitcode)})"
        except Exception as error:  # noqa: BLE001 (a library's own bug on a strange file costs that row, not the run)
            reason = f"{type(error).__name__}: {_first_line(error)}"
        return Outcome(key=key, rows=(), reason=reason)


def outcomes(work: Work, rows: Iterable[tuple[str, Row]], *, limits: Limits) -> Iterator[Outcome]:
    """Outcomes of (key, row) pairs, from local processes or a Ray cluster.

    Raises:
        UserError: Ray is asked for and missing or out of reach, or the work refused.
    """
    if limits.ray is not None:
        yield from _ray_outcomes(work, rows, limits)
        return
    with LocalPool(work, limits) as pool:
        yield from pool.outcomes(rows)


class _RayWorker:
    """A Ray actor: one process with limits, kept over many blocks."""

    def __init__(self, work: Work, limits: Limits) -> None:
        self._pool = LocalPool(work, replace(limits, workers=1, ray=None))

    def run(self, block: list[tuple[str, Row]]) -> list[Outcome]:
        """Outcomes of a block."""
        return list(self._pool.outcomes(block))


def _ray_outcomes(work: Work, rows: Iterable[tuple[str, Row]], limits: Limits) -> Iterator[Outcome]:
    if find_spec("ray") is None:
        raise UserError('--ray needs Ray: pip install "megasora[ray]", or leave --ray out')
    import ray

    _connect(limits)
    try:
        size = limits.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        # a lost node takes its actors with it: they start again elsewhere and their blocks are run again
        kind: Any = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=3)(_RayWorker)
        workers = [kind.remote(work, limits) for _ in range(size)]
        source = iter(rows)
        running: dict[Any, Any] = {}
        free = workers * 2  # one block at work and one waiting per worker
        while True:
            while free and (block := list(islice(source, _RAY_BLOCK))):
                worker = free.pop()
                running[worker.run.remote(block)] = worker
            if not running:
                return
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            free.append(running.pop(done))
            try:
                yield from ray.get(done)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause if hasattr(error, "cause") else error
                raise UserError(f"Ray worker: {_first_line(cause)}") from error
            except ray.exceptions.RayError as error:
                raise UserError(f"Ray: {_first_line(error)}; run the same command again and it goes on") from error
    finally:
        ray.shutdown()


def _connect(limits: Limits) -> None:
    """Join the cluster.

    Raises:
        UserError: there is none at that address.
    """
    import ray

    _refuse_dead_address(str(limits.ray))
    try:
        if limits.ray == "local":
            cores = limits.workers or len(os.sched_getaffinity(0))
            ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(address=limits.ray, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--ray {limits.ray}: {_first_line(error)}; give host:port of a running cluster, auto or local "
            "(a cluster that asks for a token wants RAY_AUTH_MODE=token)"
        ) from error


def _refuse_dead_address(address: str) -> None:
    """Ray itself tries an address where nothing listens for more than ten minutes.

    Raises:
        UserError: nothing listens there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"--ray {address}: nothing answers there ({error.strerror or error}); start the cluster, or use auto or local"
        ) from error


def _begin_worker(memory_bytes: int) -> None:
    """Set a worker's limits; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _exit_words(code: int | None) -> str:
    if code is None:
        return "no exit code"
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""A persistent pool of gloo ranks: importing torch, Megatron and diffusers costs seconds, so one process of a pool does it, when a job
first needs it, and the ranks are its forks.

`pool.run(n, function, *args)` runs `function(rank, *args)` on ranks 0..n-1 as a world of n and returns their results in rank order.
`function` is a module-level function of a test module; results and arguments are pickled over pipes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.multiprocessing as mp

if TYPE_CHECKING:
    from megasora.data.tiny_clips import Source

POOL_SIZE = 8
IMPORTED = (
    "pytest",
    "pyarrow.parquet",
    "megasora.data.tiny_clips",
    "megasora.inference.forward",
    "megasora.inference.sample",
    "megasora.models.autoencoders.tiny",
    "megasora.models.encoders.tiny",
    "megasora.models.mmdit.build",
    "megasora.training.autoencoder.run",
    "megasora.training.encode.run",
    "megasora.training.run",
)
"""What jobs load, and most of it a second or more: once, before the first fork."""
TIMEOUT_S = 240.0
STACKS = signal.SIGRTMIN
"""Has a rank write where its threads are; nothing of the project uses it."""


class RankFailedError(RuntimeError):
    """A rank raised; the message holds its traceback."""


def _encode_once(folder: Path) -> None:
    """Each of `tiny`'s clips is encoded once for all jobs.

    x264 writes other files at times (docs/log.md), and two runs that are compared would train on other pictures.
    """
    from megasora.config.files import written_whole
    from megasora.data import tiny_clips

    encode = tiny_clips._make

    def copied(target: Path, number: int, source: Source) -> dict[str, object]:
        kept = folder / f"{number}_{zlib.crc32(repr(source).encode()):08x}"
        if not kept.exists():
            with contextlib.suppress(OSError), written_whole(kept) as temporary:  # another rank may have been quicker
                temporary.mkdir(parents=True)
                (temporary / "row.json").write_text(json.dumps(encode(temporary, number, source)))
        row: dict[str, object] = json.loads((kept / "row.json").read_text())
        shutil.copy(kept / str(row["path"]), target)
        return row

    tiny_clips._make = copied


def _seed(pipes: list[Connection], paths: list[str], clips: Path, prepare: tuple[str, str] | None) -> None:
    """Import what ranks need once, then become each rank that is asked for: a rank is a fork of this process, which computes nothing.

    Args:
        pipes: this process's, then one for each rank.
        paths: the parent's sys.path.
        clips: folder that keeps the clips that jobs make.
        prepare: module and function to call before Megatron is imported.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # a process with another thread is not safely forked
    sys.path[:0] = [path for path in paths if path not in sys.path]
    import warnings

    warnings.filterwarnings("ignore")
    if prepare is not None:
        getattr(importlib.import_module(prepare[0]), prepare[1])()
    import torch

    torch.set_num_threads(1)
    from megasora.parallel.cpu import enable_cpu_backend

    enable_cpu_backend()
    for name in IMPORTED:
        importlib.import_module(name)
    _encode_once(clips)
    gc.freeze()  # what is imported stays; collections look at what jobs leave
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended ranks leave no zombies
    own, *of_ranks = pipes
    while True:
        try:
            order = own.recv()
        except EOFError:  # the parent died
            return
        if order is None:
            return
        rank, module = order
        with contextlib.suppress(Exception):  # the rank says so, when it imports it itself
            importlib.import_module(module)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            own.close()
            for number, pipe in enumerate(of_ranks):
                if number != rank:
                    pipe.close()
            faulthandler.register(STACKS, file=(clips.parent / f"stacks{rank}").open("w"), all_threads=True)
            _serve(rank, of_ranks[rank])
            os._exit(0)


def _serve(rank: int, connection: Connection) -> None:
    import torch.distributed as dist

    from megasora.parallel import groups

    cores = sorted(os.sched_getaffinity(0))
    connection.send(os.getpid())
    while True:
        try:
            job = connection.recv()
        except EOFError:  # the parent died
            return
        if job is None:
            return
        module, name, store, world_size, args = job
        # gloo hands a message over between three threads: cheaper on one core, where every core has a rank of its own to run
        os.sched_setaffinity(0, {cores[rank % len(cores)]} if world_size > len(cores) else cores)
        try:
            for variable, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world_size)):
                os.environ[variable] = str(value)
            function = getattr(importlib.import_module(module), name)
            dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
            result = function(rank, *args)
            dist.barrier()
            connection.send(("ok", result))
        except BaseException:  # noqa: BLE001 - sent to the parent, which raises it
            connection.send(("error", traceback.format_exc()))
        finally:
            groups.destroy()
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.collect()  # models and groups hold each other in cycles, and each group left over has three threads that wake up often


class RankPool:
    """Ranks that wait for jobs.

    Args:
        size: the most ranks; they start when a job needs them.
        timeout_s: for a job.
        prepare: module-level function that each rank calls before Megatron is imported.
    """

    def __init__(self, size: int = POOL_SIZE, *, timeout_s: float = TIMEOUT_S, prepare: Callable[[], None] | None = None) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self._prepare = None if prepare is None else (prepare.__module__, prepare.__qualname__)
        self._folder = tempfile.TemporaryDirectory(prefix="megasora-pool-")
        self._jobs = 0
        self._pipes: list[Connection] = []
        self._ranks: dict[int, int] = {}
        """Process numbers of the ranks that are there."""
        self._seed: Any = None

    def _start(self, world_size: int, module: str) -> None:
        """Start the ranks that are not there yet, for a job of a module."""
        if self._seed is None:
            context = mp.get_context("spawn")
            ours, theirs = zip(*(context.Pipe() for _ in range(1 + self.size)), strict=True)
            clips = Path(self._folder.name) / "clips"
            clips.mkdir()
            # not daemonic: Megatron's checkpoint writer starts processes of its own
            self._seed = context.Process(target=_seed, args=(list(theirs), list(sys.path), clips, self._prepare), daemon=False)
            self._seed.start()
            for pipe in theirs:
                pipe.close()
            self._orders, *self._pipes = ours
        for rank in range(world_size):
            if rank not in self._ranks:
                self._orders.send((rank, module))
                self._ranks[rank] = self._pipes[rank].recv()

    def _send(self, world_size: int, function: Callable[..., Any], args: tuple[object, ...]) -> None:
        assert world_size <= self.size, f"the pool has at most {self.size} ranks"
        self._start(world_size, function.__module__)
        self._jobs += 1
        store = os.path.join(self._folder.name, f"store{self._jobs}")
        for pipe in self._pipes[:world_size]:
            pipe.send((function.__module__, function.__qualname__, store, world_size, args))

    def run(self, world_size: int, function: Callable[..., Any], *args: object) -> list[Any]:
        """Results of `function(rank, *args)` on each rank.

        Raises:
            RankFailedError: a rank raised or did not answer in time; then all are new for the next job, which gets no late answer.
        """
        self._send(world_size, function, args)
        results: list[Any] = []
        failures: list[str] = []
        silent = False
        for rank, pipe in enumerate(self._pipes[:world_size]):
            if not pipe.poll(5.0 if failures else self.timeout_s):
                failures.append(f"rank {rank} did not answer:\n{self._stacks(rank)}")
                silent = True
                continue
            status, value = pipe.recv()
            if status == "ok":
                results.append(value)
            else:
                failures.append(f"rank {rank}:\n{value}")
        if silent:
            self._kill(world_size)
        if failures:
            raise RankFailedError("\n".join(failures))
        return results

    def run_and_kill(self, world_size: int, function: Callable[..., Any], *args: object, victim: int, when: Callable[[], bool]) -> bool:
        """Start `function` as `run` does, send SIGKILL to one rank once `when()` holds, and soon after to the others, as a launcher does.

        Returns:
            Whether the job was still running; False when it had ended before.
        """
        self._send(world_size, function, args)
        pipes = self._pipes[:world_size]
        deadline = time.monotonic() + self.timeout_s
        while not when() and not all(pipe.poll() for pipe in pipes) and time.monotonic() < deadline:
            time.sleep(0.001)
        ended = all(pipe.poll() for pipe in pipes)
        os.kill(self._ranks[victim], signal.SIGKILL)
        time.sleep(0.1)
        self._kill(world_size)
        return not ended

    def _stacks(self, rank: int) -> str:
        """Where the threads of a rank are, if it still says so."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._ranks[rank], STACKS)
            time.sleep(1)
        return (Path(self._folder.name) / f"stacks{rank}").read_text()

    def _kill(self, world_size: int) -> None:
        """End the first ranks at once, with what they still had to say."""
        for rank in range(world_size):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._ranks[rank], signal.SIGKILL)
        for rank, pipe in enumerate(self._pipes[:world_size]):
            pid = self._ranks.pop(rank)
            while os.path.exists(f"/proc/{pid}"):
                time.sleep(0.002)
            while pipe.poll():
                pipe.recv()

    def close(self) -> None:
        """End the ranks."""
        if self._seed is not None:
            for pipe in (self._pipes[rank] for rank in self._ranks):
                with contextlib.suppress(OSError):
                    pipe.send(None)
            self._orders.send(None)
            self._seed.join(5)
            deadline = time.monotonic() + 5
            while (alive := [pid for pid in self._ranks.values() if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < deadline:
                time.sleep(0.02)
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._folder.cleanup()

"""Runs that save without end and are killed, for test_killed_saves.py: `python -m tests.parallel.killed_saves FOLDER SEED TRIALS`.

One process imports everything and forks each trial's ranks, like tests/pool.py. A trial's ranks save step after step; one of them is killed
with SIGKILL, at a named place of its own code or at a random instant; the others then die as a launcher would have it. New ranks take the
lease over and load the newest good checkpoint. One JSON line a trial: what was killed where, what is there, what was loaded.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megasora.checkpoint import commit, lease, rank_file, store
from megasora.checkpoint.lease import Lease
from megasora.checkpoint.verification import newest_good
from megasora.checkpoint.writer import CheckpointWriter, Retention
from megasora.parallel.cpu import enable_cpu_backend
from tests.parallel import saves

WORLD_SIZE = 2
PLACES = ("writing", "file", "manifest", "before rename", "before tracker", "pruning", "first save", "replacing")
"""Where a rank kills itself; any other trial is killed from outside at a random instant."""
IN_LAST_RANK = ("writing", "file", "first save")
"""Places where the last rank dies; elsewhere rank 0."""


def die() -> None:
    """SIGKILL to this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def plant(place: str, rank: int) -> None:
    """Let this rank die at a place, in its second save (the first for `first save`)."""
    if place in IN_LAST_RANK and rank == WORLD_SIZE - 1:
        if place == "file":
            _die_in(rank_file.HashingFile, "finish", after=1)
        else:
            _die_in_file(1 if place == "first save" else 2)
    if rank != 0:
        return
    if place == "manifest":
        _die_in(commit, "write_synced", after=5 + 3)  # the first save calls it five times, a second one last for the manifest
    if place == "before rename":
        _die_in(commit, "publish", after=1)
    if place == "before tracker":
        _die_in(os, "replace", after=1)
    if place == "pruning":
        _die_in(commit, "prune", after=1)
    if place == "replacing":  # a checkpoint stands aside and its replacement has no name yet
        _die_in(os, "rename", after=2)


def _die_in(owner: Any, name: str, *, after: int) -> None:
    real: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            die()
        return real(*arguments, **options)

    setattr(owner, name, call)


def _die_in_file(step: int) -> None:
    """In the middle of a step's data file."""
    real = rank_file.HashingFile._append

    def append(file: rank_file.HashingFile, part: memoryview) -> None:
        if file.size > 2000 and f"step_{step:08d}" in str(file._file.name):
            die()
        real(file, part)

    rank_file.HashingFile._append = append  # type: ignore[method-assign]


def run(rank: int, root: Path, place: str) -> None:
    """Save for ever; `replacing` saves one step again and again."""
    plant(place, rank)
    held = Lease.take(root) if rank == 0 else None
    writer = CheckpointWriter(root, lease=held, retention=Retention(keep=2))
    for number in range(1, 10_000):
        step = 1 if place == "replacing" else number
        writer.save(step=step, tensors=saves.rectangles(number), state={"n": number})
        writer.poll()


def look(rank: int, root: Path, answer: Path) -> None:
    """Take over, load the newest good checkpoint, say what was found."""
    held = Lease.take(root) if rank == 0 else None
    listed = saves.steps(root)
    found = newest_good(root, lease=held)
    loaded = saves.loaded_step(found.folder) if found.folder is not None else 0
    if held is not None:
        held.release()
        hidden = sorted(path.name for path in root.glob(".*") if not lease.OWNER.fullmatch(path.name))
        facts = {"listed": listed, "loaded": loaded, "n": found.manifest.get("state", {}).get("n", 0), "hidden": hidden}
        answer.write_text(json.dumps({**facts, "refused": [one.reason for one in found.refused]}))


def start(work: Callable[[int], None], folder: Path) -> list[int]:
    """Fork a world of ranks."""
    store_file = folder / f"store{time.monotonic_ns()}"
    ranks = []
    for rank in range(WORLD_SIZE):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))
            try:
                dist.init_process_group("gloo", store=dist.FileStore(str(store_file), WORLD_SIZE), rank=rank, world_size=WORLD_SIZE)
                work(rank)
            finally:
                os._exit(0)
        ranks.append(pid)
    return ranks


def trial(folder: Path, place: str, draws: random.Random) -> dict[str, Any]:
    """One run that is killed, and what the next finds."""
    folder.mkdir()
    root = folder / "checkpoints"
    ranks = start(lambda rank: run(rank, root, place), folder)
    victim = ranks[WORLD_SIZE - 1 if place in IN_LAST_RANK else 0]
    if place not in PLACES:
        deadline = time.monotonic() + 30
        while not (root / store.TRACKER).exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draws.random() * 0.3)
        victim = draws.choice(ranks)
        os.kill(victim, signal.SIGKILL)
    _, status = os.waitpid(victim, 0)
    for other in ranks:
        if other != victim:
            os.kill(other, signal.SIGKILL)
            os.waitpid(other, 0)
    answer = folder / "answer.json"
    for pid in start(lambda rank: look(rank, root, answer), folder):
        os.waitpid(pid, 0)
    return {"place": place, "killed": ranks.index(victim), "signal": os.WTERMSIG(status), **json.loads(answer.read_text())}


def main() -> None:
    """All places, then random instants."""
    folder, seed, trials = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    enable_cpu_backend()
    draws = random.Random(seed)
    for number, place in enumerate([*PLACES, *["any instant"] * trials]):
        print(json.dumps(trial(folder / str(number), place, draws)), flush=True)


if __name__ == "__main__":
    main()

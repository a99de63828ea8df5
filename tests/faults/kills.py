"""A run that is killed again and again, at random instants and in another layout each time, until it is through."""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megasora.checkpoint import store
from megasora.config.schema import ParallelConfig, RunConfig
from tests.parallel.runs import metrics, tiny_run, train_on_rank
from tests.pool import RankPool

STEPS = 20
INTERVAL = 2
LAYOUTS: tuple[tuple[int, ParallelConfig], ...] = (
    (1, ParallelConfig()),
    (2, ParallelConfig()),
    (3, ParallelConfig()),
    (2, ParallelConfig(tensor_model_parallel_size=2)),
    (2, ParallelConfig(pipeline_model_parallel_size=2)),
    (2, ParallelConfig(context_parallel_size=2)),
    (4, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
)
"""(ranks, layout)."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What one SIGKILL found."""

    world_size: int
    victim: int
    moment: str
    in_time: bool
    """Whether the job was still running."""
    saved: int
    """Step of the newest complete checkpoint afterwards."""
    recorded: int
    """Last step with a record afterwards."""
    leftovers: int
    """Entries of the checkpoints folder that are no checkpoint."""


def run_config(run_dir: Path, layout: ParallelConfig, *, steps: int = STEPS) -> RunConfig:
    """The run, whose checkpoints come often."""
    config = tiny_run(run_dir, steps=steps, parallel=layout, interval_steps=INTERVAL)
    return replace(config, checkpoint=replace(config.checkpoint, keep=2))


def saved_step(run_dir: Path) -> int:
    """Of the newest complete checkpoint; 0 when there is none."""
    return max((entry.step for entry in store.complete_checkpoints(run_dir / "checkpoints")), default=0)


def recorded_step(run_dir: Path) -> int:
    """Last step that has a record."""
    return metrics(run_dir)[-1]["step"] if (run_dir / "metrics.jsonl").exists() and metrics(run_dir) else 0


def _being_written(root: Path) -> bool:
    """Whether a rank's file of an unfinished checkpoint is there."""
    try:
        return any(file.parent.parent != root or not file.parent.name.startswith("step_") for file in root.rglob("*.distcp"))
    except FileNotFoundError:  # a folder was renamed meanwhile
        return False


def moment(run_dir: Path, generator: random.Random) -> tuple[str, Callable[[], bool]]:
    """A random instant, half of the time inside a save: (what it is called, whether it has come)."""
    wait_s = generator.uniform(0.0, 2.5)
    root = run_dir / "checkpoints"
    if generator.random() < 0.5:
        began = time.monotonic()
        return f"{wait_s:.2f} s after the start", lambda: time.monotonic() - began > wait_s
    delay_s, since = wait_s / 25, [0.0]

    def inside() -> bool:
        if not since[0] and _being_written(root):
            since[0] = time.monotonic()
        return since[0] > 0 and time.monotonic() - since[0] > delay_s

    return f"{delay_s * 1000:.0f} ms into a save", inside


def kill_once(pool: RankPool, run_dir: Path, generator: random.Random) -> Kill:
    """Go on with the run in a random layout and kill a random rank of it."""
    world_size, layout = generator.choice(LAYOUTS)
    victim = generator.randrange(world_size)
    name, when = moment(run_dir, generator)
    in_time = pool.run_and_kill(world_size, train_on_rank, run_config(run_dir, layout), victim=victim, when=when)
    root = run_dir / "checkpoints"
    left = [path for path in root.iterdir() if not path.name.startswith("step_")] if root.is_dir() else []
    return Kill(
        world_size=world_size,
        victim=victim,
        moment=name,
        in_time=in_time,
        saved=saved_step(run_dir),
        recorded=recorded_step(run_dir),
        leftovers=len(left),
    )


def disturbed_runs(pool: RankPool, folder: Path, *, assets: Path, kills: int, seed: int) -> Iterator[tuple[Path, list[Kill]]]:
    """Runs that went through although they were killed, with their kills; as many as `kills` take.

    Raises:
        AssertionError: a kill lost a checkpoint.
    """
    generator = random.Random(seed)
    done = 0
    for number in itertools.count():
        run_dir = folder / f"run{number}"
        shutil.copytree(assets, run_dir / "assets")
        own: list[Kill] = []
        while done < kills and saved_step(run_dir) < STEPS:
            before = saved_step(run_dir)
            kill = kill_once(pool, run_dir, generator)
            assert kill.saved >= before, f"a checkpoint is gone: {kill}"
            if kill.in_time:
                own.append(kill)
                done += 1
        world_size, layout = generator.choice(LAYOUTS)
        pool.run(world_size, train_on_rank, run_config(run_dir, layout))
        yield run_dir, own
        if done >= kills:
            return

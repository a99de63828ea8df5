"""Which share of a work a task does: said on the command line, or by Slurm's job array."""

from __future__ import annotations

from collections.abc import Mapping

from megasora.config.errors import UserError


def task_of(shard: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """(i, n) of this task: item k of the work is done by task k % n.

    Args:
        shard: i/n, or None for the job array's.
        environment: where Slurm's variables are looked up (sbatch(1), JOB ARRAY SUPPORT).

    Raises:
        UserError: not two numbers with 0 <= i < n.
    """
    try:
        if shard is not None:
            task, tasks = map(int, shard.split("/"))
        else:
            first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{name}", default)) for name, default in (("MIN", "0"), ("STEP", "1")))
            task = (int(environment.get("SLURM_ARRAY_TASK_ID", str(first))) - first) // step
            tasks = int(environment.get("SLURM_ARRAY_TASK_COUNT", "1"))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--shard {shard!r} (or SLURM_ARRAY_TASK_*) is not i/n, such as 0/4") from None
    if not 0 <= task < tasks:
        raise UserError(f"--shard {task}/{tasks}: i counts from 0, so it must be below n; use 0/{tasks} to {tasks - 1}/{tasks}")
    return task, tasks

"""Training without a model: gloo ranks that add up a number a step, saved every second step and watched as training is.

`python -m tests.recovery.loop RUN_DIR STEPS STEP_S [FAULTS]`; FAULTS are `kind:rank:step`, one an incarnation, with commas between;
the rank may be `all`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megasora.cli.agent import end_restarts
from megasora.cli.endings import leave
from megasora.config.errors import UserError
from megasora.config.schema import RecoveryConfig
from megasora.parallel.meeting import store_of_this_start
from megasora.recovery.evidence import next_incarnation
from megasora.recovery.folder import RecoveryFolder, write_json
from megasora.recovery.sentry import Sentry
from megasora.recovery.watchdog import HangLimits

LIMITS = replace(
    HangLimits.of(RecoveryConfig(hang_floor_s=4.0, first_step_s=6.0, save_s=6.0), decode_timeout_s=6.0),
    silence_s=4.0,
    save_silence_s=10.0,
    last_resort_s=2.0,
)


def set_clock(hours: float) -> None:
    """Set this process's wall clock."""
    real = time.time
    time.time = lambda: real() + hours * 3600


def fail(fault: str, step: int) -> None:
    """What goes wrong on this rank in this step."""
    kind, rank, at = (*fault.split(":"), "", "")[:3]
    if kind == "clock":  # forward, and two steps later back
        at, hours = (at, 3) if step == int(at) else (str(int(at) + 2), -6)
    if not kind or rank not in ("all", str(dist.get_rank())) or int(at) != step:
        return
    if kind == "raise":
        raise ValueError("a clip of this rank is broken")
    if kind == "mistake":
        raise UserError("a setting is wrong; use another")
    if kind == "hold":
        ctypes.PyDLL(None).sleep(60)  # keeps the GIL
    if kind == "sleep":
        time.sleep(60)
    if kind == "clock":
        set_clock(hours)
    if kind == "storage":  # files cannot be written any more, and who tries waits
        Path.write_text = lambda *arguments, **options: time.sleep(600)
    if kind == "crash":
        ctypes.string_at(0)


def train(sentry: Sentry, run_dir: Path, *, steps: int, step_s: float, fault: str) -> None:
    """Sum of rank + step, over ranks and steps."""
    state = json.loads((run_dir / "state.json").read_text()) if (run_dir / "state.json").exists() else {"step": 0, "total": 0.0}
    for step in range(state["step"] + 1, steps + 1):
        sentry.beat(step, "data")
        if fault == f"clip:{dist.get_rank()}:{step}":
            time.sleep(7)  # longer than a step may take, not longer than a clip may
        sentry.batch([f"clip{step}"])
        sentry.beat(step, "forward_backward")
        time.sleep(step_s)
        fail(fault, step)
        number = torch.tensor([float(step + dist.get_rank())], dtype=torch.float64)
        dist.all_reduce(number)
        sentry.beat(step, "optimizer")
        state = {"step": step, "total": state["total"] + number.item()}
        if step % 2 == 0 or step == steps:
            sentry.beat(step, "save")
            if dist.get_rank() == 0:
                write_json(run_dir / "state.json", state)


def main(words: list[str]) -> None:
    run_dir, steps, step_s, faults = Path(words[0]), int(words[1]), float(words[2]), (*words[3:], "")[0].split(",")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = store_of_this_start(rank=rank, world_size=world_size, timeout=timedelta(minutes=5))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    number: list[Any] = [next_incarnation(RecoveryFolder.of_run(run_dir)) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(number)
    try:
        with Sentry(run_dir, rank=dist.get_rank(), world_size=dist.get_world_size(), incarnation=number[0], limits=LIMITS) as sentry:
            train(sentry, run_dir, steps=steps, step_s=step_s, fault="".join(faults[number[0] - 1 : number[0]]))
            dist.barrier()
    except UserError:
        end_restarts()
        leave(2)


if __name__ == "__main__":
    main(sys.argv[1:])

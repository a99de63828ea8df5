"""`megasora supervise`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megasora.cli.endings import leave
from megasora.config.errors import UserError
from megasora.recovery.agreement import Agreement, Place, open_store
from megasora.recovery.folder import RecoveryFolder
from megasora.recovery.restarts import RestartPolicy
from megasora.recovery.supervisor import Supervision, Supervisor


@dataclass(frozen=True, kw_only=True)
class Args:
    """Keep a run going under plain srun: one supervisor a task starts its rank, and all start theirs again when one died."""

    words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="-- train|train-ae RECIPE ...")] = ()
    """The command to keep going, after `--`."""
    max_restarts: int = 20
    """Restarts without a new step in between; exit code 2, a user's mistake, is never restarted."""
    backoff_s: float = 5.0
    """Wait before a restart; it doubles up to 5 minutes until a step is made."""
    grace_s: float = 15.0
    """How long a rank may go on after another one died, to leave its record and stacks."""
    peers_timeout_s: float = 600.0
    """How long the other supervisors may take to answer."""


def run(args: Args) -> None:
    """Refuse what cannot work before anything starts, then supervise."""
    run_dir = _run_dir(args)
    place = _place()
    supervision = Supervision(
        command=[sys.executable, "-m", "megasora", *args.words],
        folder=RecoveryFolder.of_run(run_dir),
        policy=RestartPolicy(max_restarts=args.max_restarts, backoff_s=args.backoff_s),
        grace_s=args.grace_s,
    )
    try:
        store = open_store(place, timeout_s=args.peers_timeout_s)
        code = Supervisor(supervision, place, Agreement(store, place, timeout_s=args.peers_timeout_s)).run()
    except RuntimeError as error:  # a store or a supervisor is gone: the batch system starts the job again
        print(f"megasora supervise: rank {place.rank}: {error}", file=sys.stderr, flush=True)
        code = 1
    leave(code)


def _run_dir(args: Args) -> Path:
    from megasora.cli.parsing import parse

    if args.words[:1] not in (("train",), ("train-ae",)):
        raise UserError("supervise needs the command to keep going: megasora supervise -- train RECIPE ..., or train-ae RECIPE ...")
    _, train = parse(args.words)
    return Path(train.config.run_dir or f"runs/{train.config.recipe}").absolute()


def _place() -> Place:
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        raise UserError("torchrun starts ranks again by itself: torchrun --max-restarts 20 ... -m megasora train, without supervise")
    world_size = int(env.get("WORLD_SIZE", env.get("SLURM_NTASKS", "1")))
    if world_size > 1 and ("MASTER_ADDR" not in env or "MASTER_PORT" not in env):
        raise UserError(f"{world_size} ranks need MASTER_ADDR and MASTER_PORT: export both in the sbatch file")
    return Place(
        rank=int(env.get("RANK", env.get("SLURM_PROCID", "0"))),
        world_size=world_size,
        master_addr=env.get("MASTER_ADDR", "localhost"),
        master_port=int(env.get("MASTER_PORT", "29500")),
    )

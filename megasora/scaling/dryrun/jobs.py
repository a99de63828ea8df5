"""One rank of every class of a job, in processes beside each other."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from unittest import mock

from megasora.config.schema import RunConfig
from megasora.scaling.dryrun.classes import RankClass, classes_of_step
from megasora.scaling.dryrun.result import DryRun
from megasora.scaling.dryrun.run import dry_run_step, refuse
from megasora.scaling.workload import Clips, StepPacks, planned_clips, steps_of

WORKER = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
"""Environment of the processes: Megatron warns at import of what a dry run does not need, and fake tensors compute nothing."""


@dataclass(frozen=True, kw_only=True)
class ClassRun:
    """A class of ranks and what one of them did."""

    of: RankClass
    run: DryRun


def dry_run_all(
    config: RunConfig, *, world_size: int, clips: Clips = "auto", advance: Callable[[int, int], None] = lambda done, total: None
) -> tuple[ClassRun, ...]:
    """Dry-run one rank of every class; as many processes as cores, each torch and Megatron anew.

    Args:
        config, world_size, clips: see `run.dry_run`.
        advance: told (classes done, classes) as it goes.

    Raises:
        UserError: see `run.dry_run`.
    """
    refuse(config, world_size=world_size)
    step = steps_of(config, planned_clips(config, clips=clips), world_size=world_size)[0]
    classes = classes_of_step(config, step, world_size=world_size)
    advance(0, len(classes))
    runs: dict[int, DryRun] = {}
    workers = min(len(classes), len(os.sched_getaffinity(0)))
    spawn = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, WORKER), ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        futures = {pool.submit(_run_one, config, step, world_size, one.rank): one for one in classes}
        try:
            for future in as_completed(futures):
                runs[futures[future].rank] = future.result()
                advance(len(runs), len(classes))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return tuple(ClassRun(of=one, run=runs[one.rank]) for one in classes)


def _run_one(config: RunConfig, step: StepPacks, world_size: int, rank: int) -> DryRun:
    return dry_run_step(config, step, world_size=world_size, rank=rank)

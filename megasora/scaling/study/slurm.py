"""A run of a point as a job of a Slurm cluster: rendered, submitted, followed to its end.

The job's number stands in the task's folder, so that an interrupted study finds its jobs again: they go on without it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megasora.config.errors import UserError
from megasora.config.files import written_whole
from megasora.scaling.study.grid import Point, SlurmSettings, settings_of
from megasora.scaling.study.launch import Handle, Task
from megasora.scaling.study.outcome import Ended
from megasora.slurm.flags import changed_flags
from megasora.slurm.history import read_history
from megasora.slurm.job import SlurmJob, check_job
from megasora.slurm.template import GIVEN, render

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED")
"""States of a job that will not run again; one that was preempted and will is PENDING."""
SILENCE = 30
"""Looks in a row, five minutes of them, at which Slurm gives no answer before a job counts as gone: its controller may be restarting."""


class SlurmLauncher:
    """Points as jobs.

    Args:
        recipe: what `megasora train` is given.
        settings: of the jobs.
    """

    poll_s = 10.0

    def __init__(self, recipe: str, settings: SlurmSettings) -> None:
        self.recipe, self.settings = recipe, settings
        self.at_once = settings.at_once

    def command(self, task: Task) -> list[str]:
        """What the ranks run."""
        return ["megasora", "train", self.recipe, *task.flags, "--run_dir", str(task.run_dir)]

    def start(self, task: Task) -> Handle:
        """Submit it, unless it was submitted before.

        Raises:
            UserError: Slurm refuses the job, or is not here.
        """
        number = task.folder / "job"
        if not number.exists():
            script = task.folder / "job.sbatch"
            job = job_of(task, recipe=self.recipe, settings=self.settings)
            check_job(job)
            script.write_text(render(job))
            said = _ask(["sbatch", "--parsable", f"--output={task.log}", str(script)])
            with written_whole(number) as temporary:
                temporary.write_text(said.split(";")[0].strip())
        return SlurmHandle(number.read_text().strip(), run_dir=task.run_dir)


def job_of(task: Task, *, recipe: str, settings: SlurmSettings) -> SlurmJob:
    """The job of a task. A point of fewer ranks than a node has takes a part of one.

    Raises:
        UserError: its ranks do not fill whole nodes.
    """
    per_node = min(settings.gpus_per_node, task.point.gpus)
    _whole_nodes(task.point, per_node)
    return SlurmJob(
        recipe=recipe,
        config=replace(task.point.config, run_dir=str(task.run_dir)),
        flags=tuple(changed_flags(settings_of(recipe), task.point.config, without=GIVEN)),
        command="megasora study run",
        nodes=task.point.gpus // per_node,
        gpus_per_node=per_node,
        cpus_per_gpu=settings.cpus_per_gpu,
        partition=settings.partition,
        account=settings.account,
        time=settings.time,
        warn_s=60,
        encoders=settings.encoders,
        max_restarts=0,
        options=settings.options,
        setup=settings.setup,
    )


def _whole_nodes(point: Point, per_node: int) -> None:
    if point.gpus % per_node:
        raise UserError(f"{point.id}: {point.gpus} ranks do not fill nodes of {per_node}; use multiples, or change slurm.gpus_per_node")


class SlurmHandle:
    """A job, by its number.

    Args:
        number: that sbatch gave.
        run_dir: of its run.
    """

    def __init__(self, number: str, *, run_dir: Path) -> None:
        self.number, self.run_dir, self.unanswered = number, run_dir, 0

    def poll(self) -> Ended | None:
        """Its end, by what the job's script left and Slurm says.

        Raises:
            UserError: there is no Slurm on this machine.
        """
        try:
            state = job_state(self.number, last_try=self.unanswered + 1 >= SILENCE)
        except SilentError:
            self.unanswered += 1
            return None
        self.unanswered = 0
        if state is not None and state not in ENDED:
            return None
        reason = self._verdict()
        if reason == "finished":
            return Ended(code=0)
        if state == "OUT_OF_MEMORY":
            return Ended(code=137, said="OUT_OF_MEMORY (Slurm)")
        if state in ("TIMEOUT", "DEADLINE") or (reason or "").startswith("time limit"):
            return Ended(code=1, timed_out=True, said=f"job {self.number}: the job's time limit (slurm.time)")
        mistake = (reason or "").startswith("not requeued: a mistake")
        return Ended(code=2 if mistake else 1, said=None if mistake else f"job {self.number}: {reason or state or 'gone from the queue'}")

    def interrupted(self) -> None:
        """The job goes on; the same command follows it again."""

    def _verdict(self) -> str | None:
        try:
            ends = read_history(self.run_dir).ends
        except UserError:
            return None
        return ends[-1].reason if ends else None


class SilentError(RuntimeError):
    """The controller does not answer."""


def job_state(number: str, *, last_try: bool = True) -> str | None:
    """A job's state as Slurm has it (PENDING, RUNNING, COMPLETED, ...); None when it is not known any more.

    Args:
        number: of the job.
        last_try: whether accounting is believed where the controller does not answer; it may hold the end of an earlier attempt.

    Raises:
        SilentError: the controller does not answer, and it is not the last try.
        UserError: there is no Slurm on this machine.
    """
    done = _run(["scontrol", "show", "job", number])
    match = re.search(r"JobState=([A-Z_]+)", done.stdout)
    if match:
        return match[1]
    if "Invalid job id" not in done.stderr and not last_try:
        raise SilentError(done.stderr)
    try:
        known = _ask(["sacct", "-X", "-n", "-j", number, "-o", "State%20"]).split()
    except UserError:  # no accounting; a job that Slurm has forgotten is no error
        return None
    return known[0] if known else None


def _ask(words: Sequence[str]) -> str:
    """What a command says.

    Raises:
        UserError: it fails, or is not here.
    """
    done = _run(words)
    if done.returncode:
        raise UserError(f"{words[0]}: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(list(words), capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(f"there is no {words[0]} on this machine; --launcher local runs the points here") from error

"""What a training job asks of Slurm, and how it behaves when it is interrupted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.errors import UserError
from megasora.config.schema import RunConfig

Launcher = Literal["srun", "torchrun"]
MAX_CRASHES = 3
"""Crashes in a row without a step further than ever before, after which a job is left to a person."""
PREEMPTIBLE_INTERVAL_STEPS = 200
"""Most steps between checkpoints of a job that may lose its nodes without time to save: 40 minutes at 12 seconds a step."""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """One sbatch file."""

    recipe: str
    """What the command that trains is given: a name or a config.yaml."""
    config: RunConfig | AutoencoderRunConfig
    """The settings to train with."""
    flags: tuple[str, ...]
    """How they differ from the recipe's."""
    command: str
    """The command that writes this file."""
    nodes: int
    gpus_per_node: int = 8
    """Ranks on a node; without GPUs where the settings say device cpu."""
    cpus_per_gpu: int = 12
    partition: str | None = None
    account: str | None = None
    time: str = "24:00:00"
    """Time limit in a form that sbatch(1) takes."""
    warn_s: int = 300
    """Seconds before the limit at which the ranks are told to save and end."""
    encoders: str | None = None
    """Folder of the three encoders of a diffusion transformer's run."""
    launcher: Launcher = "srun"
    preemptible: bool = False
    """Whether other jobs may take the nodes at any time."""
    max_restarts: int | None = None
    """Restarts, of any cause, after which a crash is not started again; None: 20, or 1000 where the job is preemptible."""
    options: tuple[str, ...] = ()
    """More options of sbatch, each without its dashes."""
    setup: tuple[str, ...] = ()
    """Shell lines before the launch."""

    @property
    def trains(self) -> str:
        """The command of megasora that the ranks run."""
        return "train-ae" if isinstance(self.config, AutoencoderRunConfig) else "train"

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.gpus_per_node

    @property
    def on_gpus(self) -> bool:
        """Whether nodes with GPUs are asked for."""
        return self.config.device != "cpu"

    @property
    def restarts_allowed(self) -> int:
        """`max_restarts` with its default: every preemption is a restart too."""
        if self.max_restarts is not None:
            return self.max_restarts
        return 1000 if self.preemptible else 20


def check_job(job: SlurmJob) -> None:
    """Refuse what Slurm would.

    Raises:
        UserError: a size or a time that cannot be.
    """
    least = {"nodes": 1, "gpus_per_node": 1, "cpus_per_gpu": 1, "max_restarts": 0}
    for name, at_least in least.items():
        value = getattr(job, name)
        if value is not None and value < at_least:
            raise UserError(f"--{name} {value} must be at least {at_least}")
    limit = seconds(job.time)
    if limit is not None and not 0 < job.warn_s < limit:
        raise UserError(
            f"--warn_s {job.warn_s} must be between 1 and the {limit} seconds of --time {job.time}; use 300, or a longer --time"
        )
    for option in job.options:
        if not re.match(r"[a-z][a-z-]*(=|$)", option):
            raise UserError(f"--options {option!r} is no option of sbatch without its dashes, such as qos=high")


def seconds(limit: str) -> int | None:
    """Seconds of a time limit: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S (sbatch(1), --time); None for UNLIMITED.

    Raises:
        UserError: it is none.
    """
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        raise UserError(f"--time {limit!r} is no time limit; write 24:00:00 or 2-00:00:00")
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    if match.group(1):
        return days * 86400 + first * 3600 + second * 60 + third
    return first * 3600 + second * 60 + third if match.group(4) else first * 60 + second

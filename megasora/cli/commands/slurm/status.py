"""`megasora slurm status`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megasora.cli.endings import Answer, file_errors, lines
from megasora.config.io import to_dict
from megasora.slurm.history import RestartLog, read_history


@dataclass(frozen=True, kw_only=True)
class Args:
    """How a run's job files have fared: every end of an attempt with its cause, and the step that was reached."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of the run."""
    json: bool = False
    """Print JSON."""


def run(args: Args) -> Answer:
    """One line an attempt."""
    with file_errors():
        history = read_history(args.run_dir)
    return Answer(data=to_dict(history), show=lines(_lines(history)))


def _lines(history: RestartLog) -> list[str]:
    ends = [f"{end.when}  job {end.job}  restart {end.restart:>3}  step {end.step:>6}  {end.reason}" for end in history.ends]
    return [*ends, f"step {history.step} of {history.steps}" if history.step is not None else "no step yet", *history.mistakes]

"""What the job files of a run have left in its folder: restarts.log, .mistake and metrics.jsonl."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megasora.config.errors import UserError
from megasora.config.files import json_lines
from megasora.config.io import read_yaml


@dataclass(frozen=True, kw_only=True)
class End:
    """How one attempt ended."""

    when: str
    job: int
    restart: int
    step: int
    """Last step that was recorded or saved then."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class RestartLog:
    """All attempts of a run. One that was killed with its script (failed nodes) left no end."""

    ends: tuple[End, ...]
    step: int | None
    """Last step in metrics.jsonl now."""
    steps: int
    mistakes: tuple[str, ...]
    """What ranks of the newest attempt said of a mistake in settings or files."""


LINE = re.compile(r"(\S+) job (\d+) restart (\d+) step (\d+): (.*)")


def read_history(run_dir: Path) -> RestartLog:
    """What is known of a run's attempts.

    Raises:
        UserError: the folder holds no run.
    """
    if not (run_dir / "config.yaml").exists() and not (run_dir / "restarts.log").exists():
        raise UserError(f"{run_dir} holds neither config.yaml nor restarts.log: no run has begun there")
    config = run_dir / "config.yaml"
    return RestartLog(
        ends=tuple(_end(match) for line in _lines(run_dir / "restarts.log") if (match := LINE.fullmatch(line))),
        step=max((record["step"] for record in json_lines(run_dir / "metrics.jsonl")), default=None),
        steps=_steps(config) if config.exists() else 0,
        mistakes=tuple(_lines(run_dir / ".mistake")),
    )


def _steps(config: Path) -> int:
    """Of a run of either kind.

    Raises:
        UserError: the file is none of a run.
    """
    try:
        return int(read_yaml(config)["train"]["steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{config} is no config of a run (train.steps)") from error


def _end(match: re.Match[str]) -> End:
    when, job, restart, step, reason = match.groups()
    return End(when=when, job=int(job), restart=int(restart), step=int(step), reason=reason)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []

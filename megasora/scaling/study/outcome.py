"""What became of one run of a point: from its exit code, its log and the steps it wrote."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megasora.config.errors import UserError
from megasora.config.files import json_lines, written_whole

Status = Literal["done", "refused", "failed", "timeout", "out_of_memory"]
MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|can't allocate memory|Cannot allocate memory|std::bad_alloc|oom[-_]kill", re.IGNORECASE
)
KILLED = (-9, 137)
"""Exit codes of a process that the kernel killed, which is what it does where memory runs out; torchrun says -9 in its log."""
SAID = re.compile(r"^(?:\[rank\d+\]:\s*)?(?:megasora: error: |(?:[\w.]+)?(?:Error|Exception): ).+")
"""A line that says what is wrong: ours, or the last of a traceback."""
MOST = 300
"""Characters kept of a reason."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended, as its launcher saw it."""

    code: int
    timed_out: bool = False
    said: str | None = None
    """What the launcher knows of the reason; None: look at the log."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run of a point; its file is the sign that there is a result."""

    status: Status
    reason: str = ""
    """One line; empty where all is well."""
    seconds: float = 0.0
    """Wall time of the whole run, its start included."""
    started: float = 0.0
    """Unix time."""
    command: str = ""
    """What was run: another command needs another run."""


def judge(ended: Ended, *, run_dir: Path, log: Path, steps: int) -> tuple[Status, str]:
    """(status, reason) of a run that has ended.

    Args:
        ended: by its launcher.
        run_dir: of the run.
        log: its output.
        steps: that it should have made.
    """
    text = log.read_text(errors="replace") if log.exists() else ""
    last = max((record["step"] for record in json_lines(run_dir / "metrics.jsonl")), default=0)
    if ended.code == 0 and last >= steps:
        return "done", ""
    if ended.timed_out:
        return "timeout", f"stopped at step {last} of {steps}: {ended.said or 'it took longer than timeout_s'}"
    reason = ended.said or last_error(text) or f"exit code {ended.code} at step {last} of {steps}; see {log.name}"
    killed = ended.code in KILLED or re.search(r"exitcode\s*:?\s*-9\b|Signal 9 \(SIGKILL\)", text)
    if MEMORY.search(text) or killed:
        found = next((line.strip() for line in text.splitlines() if MEMORY.search(line)), "a rank was killed (SIGKILL)")
        return "out_of_memory", found[:MOST]
    return ("refused" if ended.code == 2 else "failed"), reason[:MOST]


def last_error(text: str) -> str | None:
    """The first line of a log that says what is wrong; None where none does."""
    found = [line for line in text.splitlines() if SAID.match(line)]
    return re.sub(r"^(\[rank\d+\]:\s*)|megasora: error: ", "", found[0]).strip() if found else None


def write_outcome(outcome: Outcome, path: Path) -> None:
    """Write it; the file appears whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(asdict(outcome), indent=1))


def read_outcome(path: Path) -> Outcome | None:
    """What `write_outcome` wrote; None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        return Outcome(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and the point runs again") from error

"""What the data commands say at their ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megasora.cli.endings import Answer, lines
from megasora.config.io import to_dict


def interrupted(output: Path) -> str:
    """What an interruption of a stage leaves."""
    return f"interrupted; what is done is kept beside {output}: the same command goes on"


def stage_answer(summary: Any, *, more: tuple[str, ...] = ()) -> Answer:
    """Of a stage over rows."""
    rate = (summary.rows_in - summary.resumed) / summary.seconds if summary.seconds else 0.0
    said = [f"{summary.output}: {summary.rows_out:,} rows from {summary.rows_in:,} in {summary.seconds:.1f} s ({rate:.1f} a second)"]
    if summary.resumed:
        said.append(f"{summary.resumed:,} of them were done by an earlier run")
    if summary.failed:
        said.append(f"{summary.failed:,} could not be used; the reasons are in the table, megasora data report counts them")
    return Answer(data=to_dict(summary), show=lines([*said, *more]))

"""All ranks of a traced run: one row for each rank and step, and their mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from megasora.config.errors import UserError
from megasora.scaling.study.trace.breakdown import COLUMNS, StepParts, steps_of
from megasora.scaling.study.trace.file import read_trace


def trace_files(folder: Path) -> list[Path]:
    """Traces of a run, of its profile folder, or the file itself.

    Raises:
        UserError: there is none.
    """
    if folder.is_file():
        return [folder]
    places = (folder, folder / "profile", folder / "run" / "profile")
    found = next((files for place in places if (files := sorted([*place.glob("*.json.gz"), *place.glob("*.pt.trace.json")]))), [])
    if not found:
        raise UserError(f"{folder} holds no traces; make some: megasora train ... --profile.steps 10:12")
    return found


def read_steps(folder: Path) -> list[StepParts]:
    """Rows of all ranks, by step and rank.

    Raises:
        UserError: there are no traces, or one cannot be read.
    """
    rows = [row for file in trace_files(folder) for row in steps_of(read_trace(file))]
    return sorted(rows, key=lambda row: (row.step, row.rank))


def means(rows: Sequence[StepParts]) -> dict[str, float]:
    """Mean seconds of each column over ranks and steps."""
    return {name: sum(row.parts[name] for row in rows) / len(rows) for name in COLUMNS}


def mean_parts(folders: Iterable[Path]) -> dict[str, float] | None:
    """Means over the traces of some runs, the first traced step of each left out where it has others: the profiler starts in it.

    None where nothing was traced.
    """
    rows: list[StepParts] = []
    for folder in folders:
        if folder.is_dir() and any(folder.glob("*.json.gz")):
            found = read_steps(folder)
            first = min(row.step for row in found)
            rows += [row for row in found if row.step > first] or found
    return means(rows) if rows else None

"""`megasora study report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megasora.cli.endings import Answer, file_errors, lines


@dataclass(frozen=True, kw_only=True)
class Args:
    """A study's results as results.csv, results.md, TensorBoard and one self-contained report.html; needs no cluster."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the study, or its results.json."""
    output: Path | None = None
    """Folder to write to; None: the study's."""
    json: bool = False
    """Print the files' names as JSON."""


def run(args: Args) -> Answer:
    """Writes anew what is there."""
    from megasora.scaling.study.report import write_report
    from megasora.scaling.study.results import read_results

    results = read_results(args.folder)
    folder = args.output or (args.folder if args.folder.is_dir() else args.folder.parent)
    with file_errors():
        files = write_report(results, folder)
    return Answer(
        data={name: str(path) for name, path in files.items()}, show=lines([f"{name:<12} {path}" for name, path in files.items()])
    )

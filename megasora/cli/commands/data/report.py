"""`megasora data report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megasora.cli.endings import Answer, file_errors, lines
from megasora.curation.settings import ReportSettings

EXTRA = "data"


@dataclass(frozen=True, kw_only=True)
class Args:
    """One HTML page about a filter run: clips removed by each rule, histograms of the scores, pictures of kept and removed clips."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MANIFEST")]
    """Manifest that filter wrote."""
    settings: Annotated[ReportSettings, tyro.conf.arg(name="")]
    json: bool = False
    """Print JSON."""


def run(args: Args) -> Answer:
    """Write the page."""
    from megasora.curation.report import run_report

    with file_errors():
        path = run_report(args.source, args.settings)
    return Answer(data={"output": str(path)}, show=lines([str(path)]))

"""`megasora data probe`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megasora.cli.endings import Answer, file_errors
from megasora.cli.progress import row_bar
from megasora.cli.stage_answers import interrupted, stage_answer
from megasora.curation.settings import Limits, ProbeSettings

EXTRA = "data"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Container facts of every file: codec, size, frames, rate, bits per pixel; broken ones with their reason."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER|TABLE")]
    """Folder of raw files, or a csv/parquet list of them with a column path."""
    settings: Annotated[ProbeSettings, tyro.conf.arg(name="")]
    limits: Annotated[Limits, tyro.conf.arg(name="")] = Limits()
    json: bool = False
    """Print JSON."""


def run(args: Args) -> Answer:
    """Write the table."""
    from megasora.curation.probe import run_probe

    with row_bar("probe") as bar, file_errors(interrupted(args.settings.output)):
        summary, ignored = run_probe(args.source, args.settings, limits=args.limits, on_progress=bar.update)
    more = (f"{ignored:,} files with other endings were left out",) if ignored else ()
    return stage_answer(summary, more=more)

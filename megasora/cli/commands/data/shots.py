"""`megasora data shots`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megasora.cli.endings import Answer, file_errors
from megasora.cli.progress import row_bar
from megasora.cli.stage_answers import interrupted, stage_answer
from megasora.curation.settings import Limits, ShotsSettings

EXTRA = "data"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Shots of one scene, without black borders, as frame ranges or new files."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE")]
    """Table that probe wrote."""
    settings: Annotated[ShotsSettings, tyro.conf.arg(name="")]
    limits: Annotated[Limits, tyro.conf.arg(name="")] = Limits()
    json: bool = False
    """Print JSON."""


def run(args: Args) -> Answer:
    """Write the table."""
    from megasora.curation.shots import run_shots

    with row_bar("shots") as bar, file_errors(interrupted(args.settings.output)):
        summary = run_shots(args.source, args.settings, limits=args.limits, on_progress=bar.update)
    return stage_answer(summary)

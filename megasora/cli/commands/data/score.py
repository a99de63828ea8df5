"""`megasora data score`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megasora.cli.endings import Answer, file_errors
from megasora.cli.progress import row_bar
from megasora.cli.stage_answers import interrupted, stage_answer
from megasora.curation.settings import Limits, ScoreSettings

EXTRA = "data"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Motion, blur, light, jitter, text, hashes, aesthetics of every clip."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE")]
    """Table that shots (or probe) wrote."""
    settings: Annotated[ScoreSettings, tyro.conf.arg(name="")]
    limits: Annotated[Limits, tyro.conf.arg(name="")] = Limits()
    json: bool = False
    """Print JSON."""


def run(args: Args) -> Answer:
    """Write the table."""
    from megasora.curation.score import run_score

    with row_bar("score") as bar, file_errors(interrupted(args.settings.output)):
        summary = run_score(args.source, args.settings, limits=args.limits, on_progress=bar.update)
    return stage_answer(summary)

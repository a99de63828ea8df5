"""`megasora evaluate votes`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megasora.cli.endings import Answer


@dataclass(frozen=True, kw_only=True)
class Args:
    """Win rates from the files that the page of `evaluate clips --page` downloads, with Wilson's 95 % intervals."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Vote files, one per voter and page."""
    json: bool = False
    """Print JSON."""


def run(args: Args) -> Answer:
    """The win rates."""
    from megasora.config.errors import UserError
    from megasora.evaluation.votes import as_dict, preferences, read_ballot, render

    if not args.files:
        raise UserError("evaluate votes needs at least one FILE that the page downloaded")
    ballots = [read_ballot(path) for path in args.files]
    found = preferences(ballots)
    return Answer(data=as_dict(found, ballots), show=lambda: render(found, ballots))

"""`megasora study trace`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megasora.cli.endings import Answer


@dataclass(frozen=True, kw_only=True)
class Args:
    """Where the time of traced steps went: a row for each rank and step, in the parts that predictions have too."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A run that was traced (`train --profile.steps 10:12`), its profile folder, or one trace file."""
    json: bool = False
    """Print JSON."""


def run(args: Args) -> Answer:
    """Seconds by part."""
    from megasora.scaling.study.tables import print_trace
    from megasora.scaling.study.trace.summary import means, read_steps

    rows = read_steps(args.folder)
    data = {"steps": [asdict(row) for row in rows], "mean": means(rows)}
    return Answer(data=data, show=lambda: print_trace(rows))

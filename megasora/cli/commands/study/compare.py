"""`megasora study compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megasora.cli.endings import Answer


@dataclass(frozen=True, kw_only=True)
class Args:
    """Two studies side by side. Exit code 1 where a point of the second one is worse by more than the threshold and the spread of both."""

    a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """The study before: its folder or results.json."""
    b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The study after."""
    threshold: float = 0.05
    """Smallest relative change that counts."""
    json: bool = False
    """Print JSON."""


def run(args: Args) -> Answer:
    """Points of both, then those of one."""
    from megasora.config.errors import UserError
    from megasora.scaling.study.compare import as_dict, compare_studies
    from megasora.scaling.study.results import read_results
    from megasora.scaling.study.tables import print_comparison

    if not 0 <= args.threshold < 1:
        raise UserError(f"--threshold {args.threshold} must be in [0, 1): 0.05 is 5 %")
    comparison = compare_studies(read_results(args.a), read_results(args.b), threshold=args.threshold)
    return Answer(data=as_dict(comparison), show=lambda: print_comparison(comparison), exit_code=1 if comparison.regressed else 0)

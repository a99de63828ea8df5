"""`megasora evaluate vbench scores`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megasora.cli.endings import Answer


@dataclass(frozen=True, kw_only=True)
class Args:
    """Normalised, quality, semantic and total scores from VBench's result files, beside Open-Sora 2.0, Sora and HunyuanVideo."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """Files that end in _eval_results.json, or folders of them."""
    json: bool = False
    """Print JSON."""


def run(args: Args) -> Answer:
    """The scores."""
    from megasora.config.errors import UserError
    from megasora.evaluation.vbench.scores import as_dict, read_results, render, result_files, scores_of

    if not args.paths:
        raise UserError("evaluate vbench scores needs at least one PATH with VBench results")
    scores = scores_of(read_results(result_files(args.paths)))
    return Answer(data=as_dict(scores), show=lambda: render(scores))

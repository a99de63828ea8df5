"""`megasora inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megasora.cli.endings import Answer, file_errors


@dataclass(frozen=True, kw_only=True)
class Args:
    """What a file or folder of weights is."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """Weights of any format, a checkpoint, an adapter or an autoencoder."""
    json: bool = False
    """Print JSON."""
    tensors: bool = False
    """List every tensor."""


def run(args: Args) -> Answer:
    """The facts."""
    from megasora.checkpoint.inspect import describe, render

    with file_errors():
        facts = describe(args.path, tensors=args.tensors)
    return Answer(data=facts, show=lambda: render(facts))

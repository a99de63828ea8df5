"""`megasora compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megasora.cli.endings import Answer, file_errors


@dataclass(frozen=True, kw_only=True)
class Args:
    """Two sets of weights, tensor by tensor; of different formats by canonical names. Exit code 0 equal, 1 different."""

    a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """Weights of any format."""
    b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """Weights of any format."""
    rtol: float | None = None
    """Count tensors as equal when the largest difference is at most this fraction of B's largest magnitude; None asks for equal bits."""
    select: Literal["model", "master", "ema"] = "model"
    """Which weights of a training checkpoint."""
    json: bool = False
    """Print JSON with every tensor."""
    top: int = 10
    """Tensors to list, the most different first."""


def run(args: Args) -> Answer:
    """The differences."""
    from megasora.checkpoint.compare import compare, render

    with file_errors():
        result = compare(args.a, args.b, rtol=args.rtol, select=args.select)
    return Answer(data=result.as_dict(), show=lambda: render(result, top=args.top), exit_code=0 if result.equal else 1)

"""`megasora sample`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megasora.cli.recipe_arguments import RecipeArgs, config_defaults


@dataclass(frozen=True, kw_only=True)
class Args(RecipeArgs):
    """Text (and a first frame) to mp4, on one rank or in any layout; the seed gives the same clip in all."""

    weights: Path
    """Weights of any format, or a training checkpoint."""
    prompt: tuple[str, ...]
    """One or more prompts."""
    output: Path
    """Folder of the clips."""
    image: Path | None = None
    """First frame (i2v_head)."""
    select: Literal["model", "ema"] = "model"
    """Which weights of a training checkpoint."""
    height: int | None = None
    """Pixels; None takes --sample.height. So with the next five."""
    width: int | None = None
    """Pixels."""
    num_frames: int | None = None
    """Frames: 1 or 4k+1."""
    fps: float | None = None
    """Frames per second of the clip."""
    steps: int | None = None
    """Euler steps."""
    seed: int | None = None
    """Seed of the noise."""


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe's settings."""
    return config_defaults(words, command="sample")


def run(args: Args) -> None:
    """Write one clip per prompt."""
    from megasora.inference.sample import run_sample

    given = {name: value for name, value in vars(args).items() if name not in ("source", "config")}
    run_sample(args.config, **given)

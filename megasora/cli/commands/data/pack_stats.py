"""`megasora data pack-stats`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from megasora.cli.endings import Answer
from megasora.cli.parsing import parse_some
from megasora.cli.recipe_arguments import Config, config_named
from megasora.config.errors import UserError
from megasora.config.validate import raise_on_problems

EXTRA = "data"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Balance and padding of a stage's packs on a number of replicas, without GPUs; also takes the recipe's own settings."""

    manifest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MANIFEST")]
    """Table of clips."""
    dp: int
    """Data-parallel replicas."""
    steps: int | None = None
    """Steps to simulate; None takes a whole epoch."""
    buckets: bool = False
    """Also simulate the published bucket scheme on the same samples."""
    json: bool = False
    """Print JSON."""
    config: Config


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    recipe: str = "opensora2_stage1"


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The settings of --recipe, a recipe or a config.yaml."""
    return {"config": config_named(parse_some(_Recipe, words).recipe)}


def run(args: Args) -> Answer:
    """Simulate."""
    if args.dp < 1 or (args.steps is not None and args.steps < 1):
        raise UserError(f"--dp {args.dp} and --steps {args.steps} must be positive")
    config = args.config
    raise_on_problems(config, world_size=args.dp * config.parallel.model_parallel_size, check_memory=False)
    from megasora.data.pack_stats import render, stats_of_run

    facts = stats_of_run(config, args.manifest, replicas=args.dp, steps=args.steps, buckets=args.buckets)
    return Answer(data=facts, show=lambda: render(facts))

"""`megasora train`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megasora.cli.recipe_arguments import RecipeArgs, config_defaults
from megasora.config.validate import raise_on_problems


@dataclass(frozen=True, kw_only=True)
class Args(RecipeArgs):
    """Train, or go on with a run."""


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe's settings."""
    return config_defaults(words, command="train")


def run(args: Args) -> None:
    """Refuse what cannot work before the slow imports, then train; with device=auto the memory estimate waits for the device."""
    world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    raise_on_problems(args.config, world_size=world_size, check_memory=False)
    from megasora.training.run import train

    train(args.config)

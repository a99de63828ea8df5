"""`megasora train-ae`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megasora.cli.recipe_arguments import AutoencoderArgs, autoencoder_defaults
from megasora.config.autoencoder_checks import raise_on_autoencoder_problems


@dataclass(frozen=True, kw_only=True)
class Args(AutoencoderArgs):
    """Train an autoencoder of clips, or go on with a run."""


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe's settings."""
    return autoencoder_defaults(words, command="train-ae")


def run(args: Args) -> None:
    """Refuse what cannot work before the slow imports, then train."""
    world_size = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    raise_on_autoencoder_problems(args.config, world_size=world_size)
    from megasora.training.autoencoder.run import train_autoencoder

    train_autoencoder(args.config)

"""`megasora show`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megasora.cli.endings import Answer
from megasora.cli.recipe_arguments import AutoencoderArgs, RecipeArgs, autoencoder_defaults, config_defaults, names_autoencoder
from megasora.config.io import dump, to_dict


@dataclass(frozen=True, kw_only=True)
class Args(RecipeArgs):
    """Every setting of a recipe, as YAML that is a config.yaml too."""

    json: bool = False
    """Print JSON instead."""


@dataclass(frozen=True, kw_only=True)
class OfAutoencoder(AutoencoderArgs):
    """Every setting of an autoencoder's recipe, as YAML that is a config.yaml too."""

    json: bool = False
    """Print JSON instead."""


OTHERS = (OfAutoencoder,)


def kind_of(words: Sequence[str]) -> type:
    """Of a recipe of a diffusion transformer, or of an autoencoder."""
    return OfAutoencoder if names_autoencoder(words) else Args


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe's settings."""
    return (autoencoder_defaults if names_autoencoder(words) else config_defaults)(words, command="show")


def run(args: Args | OfAutoencoder) -> Answer:
    """The settings."""
    return Answer(data=to_dict(args.config), show=lambda: print(dump(args.config), end=""))

"""`megasora show`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megasora.cli.endings import Answer
from megasora.cli.recipe_arguments import RecipeArgs, config_defaults
from megasora.config.io import dump, to_dict


@dataclass(frozen=True, kw_only=True)
class Args(RecipeArgs):
    """Every setting of a recipe, as YAML that is a config.yaml too."""

    json: bool = False
    """Print JSON instead."""


def defaults(words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe's settings."""
    return config_defaults(words, command="show")


def run(args: Args) -> Answer:
    """The settings."""
    return Answer(data=to_dict(args.config), show=lambda: print(dump(args.config), end=""))

"""RECIPE [--section.field value ...]: what the commands share that start from a recipe or from a run's config.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from megasora import recipes
from megasora.config.errors import UserError
from megasora.config.io import load_yaml
from megasora.config.schema import RunConfig

Config = Annotated[RunConfig, tyro.conf.arg(name="")]
"""Settings as flags of their own names: --train.steps."""


@dataclass(frozen=True, kw_only=True)
class RecipeArgs:
    """A recipe and what is changed in it."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """A name from `megasora recipes`, or the config.yaml of an earlier run; followed by --help it shows every setting's value there."""
    config: Config


def config_named(name: str) -> RunConfig:
    """The settings of a recipe or of a config.yaml.

    Raises:
        UserError: there is none, or the file is no config.
    """
    return load_yaml(Path(name)) if name.endswith((".yaml", ".yml")) else recipes.get(name)


def config_defaults(words: Sequence[str], *, command: str) -> Mapping[str, Any]:
    """`defaults` of a command whose first word is a recipe.

    Raises:
        UserError: the first word is none.
    """
    if words[:1] in (["-h"], ["--help"]):
        return {"config": RunConfig(recipe="RECIPE")}
    if not words or words[0].startswith("-"):
        raise UserError(f"{command} needs a recipe or a config.yaml: megasora {command} RECIPE; there are {', '.join(recipes.RECIPES)}")
    return {"config": config_named(words[0])}

"""RECIPE [--section.field value ...]: what the commands share that start from a recipe or from a run's config.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from megasora import recipes
from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.errors import UserError
from megasora.config.io import from_dict, load_yaml, read_yaml
from megasora.config.schema import RunConfig

Config = Annotated[RunConfig, tyro.conf.arg(name="")]
"""Settings as flags of their own names: --train.steps."""


@dataclass(frozen=True, kw_only=True)
class RecipeArgs:
    """A recipe and what is changed in it."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """A name from `megasora recipes`, or the config.yaml of an earlier run; followed by --help it shows every setting's value there."""
    config: Config


@dataclass(frozen=True, kw_only=True)
class AutoencoderArgs:
    """An autoencoder's recipe and what is changed in it."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """A name from `megasora recipes`, or the config.yaml of an earlier run; followed by --help it shows every setting's value there."""
    config: Annotated[AutoencoderRunConfig, tyro.conf.arg(name="")]


def names_autoencoder(words: Sequence[str]) -> bool:
    """Whether the first word is an autoencoder's recipe, or the config.yaml of its run."""
    if not words or words[0].startswith("-"):
        return False
    path = Path(words[0])
    if path.suffix in (".yaml", ".yml") and path.is_file():
        data = read_yaml(path)
        return isinstance(data, dict) and "autoencoder" in data
    return words[0] in recipes.AUTOENCODER_RECIPES


def autoencoder_named(name: str) -> AutoencoderRunConfig:
    """The settings of an autoencoder's recipe or config.yaml.

    Raises:
        UserError: there is none, or the file is none of an autoencoder's run.
    """
    if not name.endswith((".yaml", ".yml")):
        return recipes.get_autoencoder(name)
    data = read_yaml(Path(name))
    if isinstance(data, dict) and "autoencoder" not in data:
        raise UserError(f"{name} is of a run of a diffusion transformer: megasora train takes it")
    config: AutoencoderRunConfig = from_dict(data, AutoencoderRunConfig)
    return config


def autoencoder_defaults(words: Sequence[str], *, command: str) -> Mapping[str, Any]:
    """`defaults` of a command whose first word is an autoencoder's recipe.

    Raises:
        UserError: the first word is none.
    """
    if words[:1] in (["-h"], ["--help"]):
        return {"config": AutoencoderRunConfig(recipe="RECIPE")}
    if not words or words[0].startswith("-"):
        known = ", ".join(recipes.AUTOENCODER_RECIPES)
        raise UserError(f"{command} needs a recipe or a config.yaml: megasora {command} RECIPE; there are {known}")
    return {"config": autoencoder_named(words[0])}


def name_elsewhere(name: str) -> str:
    """The recipe, or the config.yaml, as a command in another folder names it."""
    return str(Path(name).absolute()) if name.endswith((".yaml", ".yml")) else name


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

"""Recipes (layer L1): functions that return a RunConfig, or an
AutoencoderRunConfig for `megasora train-ae`. A recipe holds the published numbers, each with its source."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
from megasora.recipes.autoencoders import dc_ae_distill, dc_ae_stage1, dc_ae_stage2, hunyuan_vae_finetune, tiny_ae, tiny_ae_distill
from megasora.recipes.opensora2 import (
    opensora2_dc_ae,
    opensora2_image,
    opensora2_stage1,
    opensora2_stage2,
    opensora2_stage3,
)
from megasora.recipes.tiny import tiny

RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe for recipe in (tiny, opensora2_image, opensora2_stage1, opensora2_stage2, opensora2_stage3, opensora2_dc_ae)
}
AUTOENCODER_RECIPES: dict[str, Callable[[], AutoencoderRunConfig]] = {
    recipe.__name__: recipe for recipe in (tiny_ae, tiny_ae_distill, dc_ae_stage1, dc_ae_stage2, dc_ae_distill, hunyuan_vae_finetune)
}


def get(name: str) -> RunConfig:
    """The recipe called `name`.

    Raises:
        UserError: there is none, or it is of an autoencoder; names the nearest.
    """
    if name in AUTOENCODER_RECIPES:
        raise UserError(f"{name} is a recipe of an autoencoder: megasora train-ae takes it")
    if name not in RECIPES:
        raise UserError(_no_recipe(name, RECIPES))
    return RECIPES[name]()


def get_autoencoder(name: str) -> AutoencoderRunConfig:
    """The autoencoder's recipe called `name`.

    Raises:
        UserError: there is none, or it is of a diffusion transformer; names the nearest.
    """
    if name in RECIPES:
        raise UserError(f"{name} is a recipe of a diffusion transformer: megasora train takes it")
    if name not in AUTOENCODER_RECIPES:
        raise UserError(_no_recipe(name, AUTOENCODER_RECIPES))
    return AUTOENCODER_RECIPES[name]()


def _no_recipe(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return f"no recipe called {name!r}: {hint}"

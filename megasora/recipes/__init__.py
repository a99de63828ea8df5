"""Recipes (layer L1): functions that return a RunConfig. A recipe holds the published numbers, each with its source."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from megasora.config.errors import UserError
from megasora.config.schema import RunConfig
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


def get(name: str) -> RunConfig:
    """The recipe called `name`.

    Raises:
        UserError: there is none; names the nearest.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(RECIPES)}"
        raise UserError(f"no recipe called {name!r}: {hint}")
    return RECIPES[name]()

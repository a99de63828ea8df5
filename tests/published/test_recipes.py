"""Every recipe against recipes.csv: what hpcaitech/Open-Sora configs/diffusion/train at 7ad6a96 and the report (OS2) say, typed in by hand.

`value` is what a recipe holds; where repository and report differ, `other` is what it does not hold, with its source.
"""

from __future__ import annotations

import ast
import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from megasora import recipes
from megasora.config.schema import RunConfig

PUBLISHED = [name for name in recipes.RECIPES if name.startswith("opensora2_")]
TOKENS = {("256px", 1): 16 * 16, ("256px", 129): 33 * 16 * 16, ("768px", 129): 33 * 48 * 48, ("768px", 128): 32 * 24 * 24}
"""Video tokens by class and frames; 128 frames are the DC-AE's."""


def table() -> dict[str, dict[str, str]]:
    """Values by recipe and field."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    with (Path(__file__).parent / "recipes.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name in PUBLISHED if row["recipe"] == "*" else [row["recipe"]]:
                assert row["field"] not in found[name] and row["source"] and bool(row["other"]) == bool(row["other source"])
                found[name][row["field"]] = row["value"]
    return found


def literal(text: str) -> Any:
    """A Python value, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return sum(map(int, text.split("+"))) if "+" in text else text


def mix(fields: dict[str, str]) -> set[tuple[str, int, float, float]]:
    """'mix 256px' -> '1 5-129/4 @ 1.0': frames 1 and 5, 9, ..., 129, each with that probability and no pair."""
    entries = set()
    for field, value in fields.items():
        if field.startswith("mix "):
            frames, _, probability = value.partition(" @ ")
            for part in frames.split():
                first, _, rest = part.partition("-")
                last, _, step = (rest or first).partition("/")
                entries |= {(field[4:], count, float(probability), 0.0) for count in range(int(first), int(last) + 1, int(step or 1))}
    return entries


def recomputed(config: RunConfig) -> tuple[int, int]:
    """Double and single blocks recomputed in full; 100 is every one, as there."""
    parallel = config.parallel
    if parallel.recompute == "full":
        return 100, 100
    return parallel.recompute_double_blocks, 100 if parallel.recompute_single_blocks == config.model.num_single_blocks else 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_holds_the_published_numbers(name: str) -> None:
    config, fields = recipes.get(name), table()[name]
    assert len(fields) > 40
    for field, value in fields.items():
        if field == "recompute":
            assert recomputed(config) == literal(value)
        elif field.startswith("batch "):
            _, resolution, frames = field.split()
            size, replicas = map(int, value.split(" x "))
            assert config.data.global_tokens == size * replicas * (TOKENS[resolution, int(frames)] + 512), field
        elif not field.startswith("mix "):
            section, attribute = field.split(".")
            assert getattr(getattr(config, section), attribute) == literal(value), field


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_mixes_the_published_buckets(name: str) -> None:
    data, entries = recipes.get(name).data, mix(table()[name])
    assert len(data.bucket_mix) == len(entries) and set(data.bucket_mix) == entries
    assert set(data.frame_counts) == {frames for _, frames, _, _ in entries}
    assert len(entries) == {"opensora2_image": 3, "opensora2_stage3": 66, "opensora2_dc_ae": 30}.get(name, 35)


def test_every_stage_follows_one_that_there_is() -> None:
    chain = [recipes.get(name).init.follows for name in ("opensora2_stage3", "opensora2_stage2", "opensora2_stage1", "opensora2_image")]
    assert chain == ["opensora2_stage2", "opensora2_stage1", "opensora2_image", None]

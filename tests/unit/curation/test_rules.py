"""Every rule on both sides of its threshold: a clip at the threshold stays, a clip just beyond is removed by that rule alone."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from megasora.curation.columns import SCORES, SHOTS
from megasora.curation.rules import STAGES, FilterRules, active_rules
from megasora.data.buckets import published_sizes
from tests.unit.curation.test_filter import row

RULES = FilterRules(
    even_fps=True,
    banned_profiles=("Constrained Baseline", "Simple"),
    min_duration_s=2.0,
    max_duration_s=9.0,
    min_fps=16.0,
    min_bits_per_pixel=0.02,
    max_aspect=3.0,
    min_side_px=160,
    max_black_share=0.1,
    max_dark_share=0.9,
    max_bright_share=0.5,
    max_freeze_share=0.5,
    min_blur_laplacian=15.0,
    min_vmaf_motion=0.5,
    max_vmaf_motion=40.0,
    max_jitter=20.0,
    max_text_area=0.25,
    min_aesthetic=5.0,
    captioned=True,
    where="codec <> 'vp8'",
)
SIDES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("broken", {"error": ""}, {"error": "truncated"}),
    ("upright", {"rotation": 360}, {"rotation": 180}),
    ("upright", {"rotation": None}, {"rotation": -90}),
    ("square_pixels", {"sample_aspect_ratio": 1.009}, {"sample_aspect_ratio": 1.011}),
    ("square_pixels", {"sample_aspect_ratio": None}, {"sample_aspect_ratio": 0.989}),
    ("even_fps", {"variable_fps": None}, {"variable_fps": True}),
    ("banned_profiles", {"profile": "Main"}, {"profile": "Simple"}),
    ("banned_profiles", {"profile": None}, {"profile": "Constrained Baseline"}),
    ("min_duration_s", {"duration_s": 2.0}, {"duration_s": 1.999}),
    ("max_duration_s", {"duration_s": 9.0}, {"duration_s": 9.001}),
    ("min_fps", {"fps": 16.0}, {"fps": 15.999}),
    ("min_bits_per_pixel", {"bits_per_pixel": 0.02}, {"bits_per_pixel": 0.0199}),
    ("max_aspect", {"aspect_ratio": 3.0}, {"aspect_ratio": 3.001}),
    ("max_aspect", {"aspect_ratio": 0.34}, {"aspect_ratio": 0.333}),
    ("min_side_px", {"resolution": 160 * 320, "aspect_ratio": 0.5}, {"resolution": 159 * 318, "aspect_ratio": 0.5}),
    ("min_side_px", {"resolution": 160 * 320, "aspect_ratio": 2.0}, {"resolution": 159 * 318, "aspect_ratio": 2.0}),
    ("unscored", {"score_error": ""}, {"score_error": "frame 3 is corrupt"}),
    ("max_black_share", {"black_share": 0.1}, {"black_share": 0.101}),
    ("max_dark_share", {"dark_share": 0.9}, {"dark_share": 0.901}),
    ("max_bright_share", {"bright_share": 0.5}, {"bright_share": 0.501}),
    ("max_freeze_share", {"freeze_share": 0.5}, {"freeze_share": 0.501}),
    ("min_blur_laplacian", {"blur_laplacian": 15.0}, {"blur_laplacian": 14.999}),
    ("min_vmaf_motion", {"vmaf_motion": 0.5}, {"vmaf_motion": 0.499}),
    ("max_vmaf_motion", {"vmaf_motion": 40.0}, {"vmaf_motion": 40.001}),
    ("max_jitter", {"jitter": 20.0}, {"jitter": 20.001}),
    ("max_text_area", {"text_area": 0.25}, {"text_area": 0.251}),
    ("min_aesthetic", {"aesthetic": 5.0}, {"aesthetic": 4.999}),
    ("captioned", {"text": "x"}, {"text": "  "}),
    ("captioned", {"text": "x"}, {"text": None}),
    ("where", {"codec": "vp9"}, {"codec": "vp8"}),
    ("where", {"codec": "vp9"}, {"codec": None}),
]
"""Rule, what it keeps, what it removes."""
SCORED = ("black_share", "dark_share", "bright_share", "freeze_share", "blur_laplacian", "vmaf_motion", "jitter", "text_area", "aesthetic")
SCHEMA = pa.schema([*SHOTS, *SCORES])


def failed(rules: FilterRules, **changes: Any) -> list[str]:
    """Names of the rules that a clip fails, by their SQL."""
    clip = row("it", **{"aesthetic": 9.0, **changes})
    with duckdb.connect() as database:
        database.register("clips", pa.Table.from_pylist([clip], schema=SCHEMA))
        return [rule.name for rule in active_rules(rules) if database.sql(f"SELECT {rule.removes} FROM clips").fetchall() == [(True,)]]


@pytest.mark.parametrize(("name", "kept", "removed"), SIDES, ids=[f"{name} {removed}" for name, _, removed in SIDES])
def test_a_rule_keeps_what_is_at_its_threshold_and_removes_what_is_beyond(name: str, kept: dict[str, Any], removed: dict[str, Any]) -> None:
    assert failed(RULES, **kept) == []
    assert failed(RULES, **removed) == [name]


def test_both_sides_are_tried_for_every_rule() -> None:
    settings = {field.name for field in fields(FilterRules)} - {"duplicate_bits"}
    assert {name for name, _, _ in SIDES} == settings | {"broken", "unscored"} == {rule.name for rule in active_rules(RULES)}


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_score_that_was_not_taken_fails_its_rules_and_no_others(missing: float | None) -> None:
    for column in SCORED:
        wanted = [rule.name for rule in active_rules(RULES) if rule.column == column]
        assert wanted and failed(RULES, **{column: missing}) == wanted


def test_an_image_passes_what_only_a_video_has() -> None:
    nothing = dict.fromkeys(("vmaf_motion", "jitter", "freeze_share", "bits_per_pixel"))
    assert failed(RULES, media="image", duration_s=0.0, fps=1.0, **nothing) == []
    assert failed(RULES, media="image", text_area=0.251) == ["max_text_area"]


@pytest.mark.parametrize("stage", ["256px", "768px"])
def test_a_stage_enlarges_no_clip_to_the_shortest_side_of_its_class(stage: str) -> None:
    side = min(min(size) for size in published_sizes(stage, 16).values())
    rules = replace(STAGES[stage], duplicate_bits=None)  # type: ignore[index]
    assert failed(rules, resolution=side * side, aspect_ratio=1.0) == []
    assert failed(rules, resolution=(side - 1) ** 2, aspect_ratio=1.0) == ["min_side_px"]

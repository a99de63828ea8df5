"""The rules of the data pyramid and its stages: every threshold is a setting with its unit, its reason and its source.

"Published" means the Open-Sora 2.0 report, section 2.1; "chosen" means that the report names the filter and not the number. A rule that
is None is off. A score that is missing (null, or not a number) fails its rule: what was not measured is not known to be good.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megasora.media.display import SQUARE_TOLERANCE

StageName = Literal["256px", "256px_i2v", "768px"]


@dataclass(frozen=True, kw_only=True)
class FilterRules:
    """Thresholds; None turns a rule off. Defaults are those of the stage."""

    upright: bool = True
    """Remove clips that are stored turned: their columns and their crop are not those of the picture that is shown. `shots --clips` writes
    them upright."""
    square_pixels: bool = True
    """Remove clips whose pixels are more than 1 % wider or higher than square (media/display.py says why 1 %); the reason is the same.
    `shots --clips` writes them square."""
    even_fps: bool = False
    """Remove clips of variable frame rate; frames keep their numbers, but the rate a caption tells is only a mean."""
    banned_profiles: tuple[str, ...] = ("Constrained Baseline",)
    """Codec profiles that go with poor sources (published)."""
    min_duration_s: float | None = 2.0
    """Seconds (published)."""
    max_duration_s: float | None = None
    """Seconds; `shots` cuts at 8, so longer ones come only from tables that did not pass it."""
    min_fps: float | None = 16.0
    """Frames per second (published)."""
    min_bits_per_pixel: float | None = 0.02
    """Bits of the video stream per pixel; fewer show blocks (published)."""
    max_aspect: float | None = 3.0
    """Longer by shorter side; the published range of height / width is [1/3, 3]."""
    min_side_px: int | None = 160
    """Shorter side in pixels, so that a clip is not enlarged: the shortest side of the resolution class (chosen)."""
    max_black_share: float | None = 0.1
    """Share of black frames: fades and title cards (chosen)."""
    max_dark_share: float | None = 0.9
    """Share of pixels that are nearly black; night scenes stay (chosen)."""
    max_bright_share: float | None = 0.5
    """Share of pixels that are nearly white: overexposed, or slides (chosen)."""
    max_freeze_share: float | None = 0.5
    """Share of frames that repeat the one before; pulldown repeats 0.2, a slide show nearly all (chosen)."""
    min_blur_laplacian: float | None = 15.0
    """Variance of the Laplacian, median of 5 frames (the published vote of the majority); a Gaussian blur of sigma 6 leaves 5 (chosen)."""
    min_vmaf_motion: float | None = 0.3
    """vmafmotion; below, next to nothing moves (both tails are cut as published; numbers chosen)."""
    max_vmaf_motion: float | None = 40.0
    """vmafmotion; above, frames have little to do with each other (chosen)."""
    max_jitter: float | None = 20.0
    """Mean change of hue, saturation and value from frame to frame, of 255: shaken or flickering; fast real shots reach 10 (chosen)."""
    max_text_area: float | None = 0.1
    """Share of a frame inside text boxes; a line of subtitles covers 0.03 (chosen)."""
    min_aesthetic: float | None = None
    """Aesthetic score (about 1 to 10); off because the weights come from you. 4.5 to 5 are usual with LAION's head (chosen)."""
    captioned: bool = False
    """Remove clips without a caption."""
    duplicate_bits: int | None = 31
    """Largest distance of the PDQ hashes (256 bits) of near-duplicate frames. facebook/ThreatExchange pdq: 31."""
    where: str | None = None
    """One more condition on the columns, in SQL, that kept clips fulfil, such as "codec <> 'mpeg4' AND height >= 480"."""


STAGES: dict[StageName, FilterRules] = {
    "256px": FilterRules(),
    "256px_i2v": FilterRules(min_blur_laplacian=25.0, min_vmaf_motion=0.5, max_vmaf_motion=30.0, max_jitter=17.0, max_text_area=0.05),
    "768px": FilterRules(
        min_side_px=496,
        min_blur_laplacian=50.0,
        min_vmaf_motion=0.5,
        max_vmaf_motion=25.0,
        max_jitter=15.0,
        max_text_area=0.02,
        max_dark_share=0.8,
        max_bright_share=0.3,
        max_freeze_share=0.3,
        max_black_share=0.02,
    ),
}
"""The pyramid: each stage keeps a part of what the one before keeps."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule, ready for SQL."""

    name: str
    """Name of its setting."""
    column: str
    """The column it looks at."""
    removes: str
    """SQL that is true for clips it removes; never null."""
    reason: str
    """For a person, with the number."""


SCORED_BY = {
    "vmaf_motion": "motion",
    "blur_laplacian": "blur",
    "dark_share": "light",
    "bright_share": "light",
    "black_share": "light",
    "jitter": "jitter",
    "freeze_share": "jitter",
    "text_area": "text",
    "aesthetic": "aesthetic",
    "frame_hashes": "hashes",
}
"""Column -> the score that fills it (score --scores ...)."""
_VIDEO_ONLY = ("vmaf_motion", "jitter", "freeze_share", "duration_s", "fps", "bits_per_pixel")
"""What an image does not have."""


def active_rules(rules: FilterRules) -> Iterator[Rule]:
    """The rules that are on, in the order in which a removed clip is put down to one: facts before scores, `where` last."""
    yield Rule(name="broken", column="error", removes="error <> ''", reason="cannot be read")
    if rules.upright:
        yield _flag("upright", "rotation", "coalesce(rotation, 0) % 360 <> 0", "stored turned")
    if rules.square_pixels:
        removes = f"abs(coalesce(sample_aspect_ratio, 1) - 1) > {SQUARE_TOLERANCE!r}"
        yield _flag("square_pixels", "sample_aspect_ratio", removes, "pixels that are not square")
    if rules.even_fps:
        yield _flag("even_fps", "variable_fps", "coalesce(variable_fps, false)", "variable frame rate")
    if rules.banned_profiles:
        listed = ", ".join(_text(name) for name in rules.banned_profiles)
        yield _flag(
            "banned_profiles", "profile", f"coalesce(profile IN ({listed}), false)", f"profile {' or '.join(rules.banned_profiles)}"
        )
    yield from _bound("min_duration_s", "duration_s", "<", rules.min_duration_s, "shorter than {} s")
    yield from _bound("max_duration_s", "duration_s", ">", rules.max_duration_s, "longer than {} s")
    yield from _bound("min_fps", "fps", "<", rules.min_fps, "fewer than {} frames a second")
    yield from _bound("min_bits_per_pixel", "bits_per_pixel", "<", rules.min_bits_per_pixel, "fewer than {} bits per pixel")
    if rules.max_aspect is not None:
        removes = f"coalesce(greatest(aspect_ratio, 1 / aspect_ratio) > {rules.max_aspect!r}, true)"
        yield Rule(name="max_aspect", column="aspect_ratio", removes=removes, reason=f"aspect beyond {rules.max_aspect:g}:1")
    if rules.min_side_px is not None:
        # resolution and aspect_ratio are those inside the crop, so the shorter side follows from them
        shorter = "sqrt(resolution * least(aspect_ratio, 1 / aspect_ratio))"
        removes = f"coalesce({shorter} < {rules.min_side_px} - 0.5, true)"
        yield Rule(name="min_side_px", column="resolution", removes=removes, reason=f"shorter side below {rules.min_side_px} pixels")
    yield Rule(name="unscored", column="score_error", removes="score_error <> ''", reason="could not be scored")
    yield from _bound("max_black_share", "black_share", ">", rules.max_black_share, "black in more than {} of the frames")
    yield from _bound("max_dark_share", "dark_share", ">", rules.max_dark_share, "more than {} of the pixels dark")
    yield from _bound("max_bright_share", "bright_share", ">", rules.max_bright_share, "more than {} of the pixels white")
    yield from _bound("max_freeze_share", "freeze_share", ">", rules.max_freeze_share, "more than {} of the frames repeat the one before")
    yield from _bound("min_blur_laplacian", "blur_laplacian", "<", rules.min_blur_laplacian, "blurred: Laplacian variance below {}")
    yield from _bound("min_vmaf_motion", "vmaf_motion", "<", rules.min_vmaf_motion, "motion below {}")
    yield from _bound("max_vmaf_motion", "vmaf_motion", ">", rules.max_vmaf_motion, "motion above {}")
    yield from _bound("max_jitter", "jitter", ">", rules.max_jitter, "jitter above {}")
    yield from _bound("max_text_area", "text_area", ">", rules.max_text_area, "text on more than {} of a frame")
    yield from _bound("min_aesthetic", "aesthetic", "<", rules.min_aesthetic, "aesthetic score below {}")
    if rules.captioned:
        yield _flag("captioned", "text", "trim(coalesce(text, '')) = ''", "no caption")
    if rules.where is not None:
        yield Rule(name="where", column="", removes=f"NOT coalesce(({rules.where}), false)", reason=f"not: {rules.where}")


def without(rules: FilterRules, name: str) -> FilterRules:
    """The rules with one of them off."""
    off = () if name == "banned_profiles" else False if isinstance(getattr(rules, name), bool) else None
    return replace(rules, **{name: off})  # type: ignore[arg-type]


def _flag(name: str, column: str, removes: str, reason: str) -> Rule:
    return Rule(name=name, column=column, removes=removes, reason=reason)


def _bound(name: str, column: str, relation: Literal["<", ">"], limit: float | None, reason: str) -> Iterator[Rule]:
    """A rule `column relation limit`; a missing value is removed, an image passes what only videos have."""
    if limit is None:
        return
    removes = f"coalesce(isnan({column}) OR {column} {relation} {float(limit)!r}, true)"
    if column in _VIDEO_ONLY:
        removes = f"(media = 'video' AND {removes})"
    yield Rule(name=name, column=column, removes=removes, reason=reason.format(f"{limit:g}"))


def _text(value: str) -> str:
    """An SQL string."""
    return "'" + value.replace("'", "''") + "'"

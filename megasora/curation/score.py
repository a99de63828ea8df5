"""Scores of every clip: motion, blur, light, jitter, frozen and black frames, text, aesthetics, hashes for near duplicates.

A clip is decoded once; small copies of all frames and a few full ones serve every score. Each score is a function of the clip alone, so the
table is the same from any number of processes or machines. Models (text boxes, aesthetics) are loaded once per process.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from megasora.config.errors import UserError
from megasora.curation.aesthetic import AestheticModel, read_note
from megasora.curation.columns import SCORES
from megasora.curation.frames import DamagedClipError, FilterGraph, SmallFrames, Span, evenly, full_bgr, read_frames
from megasora.curation.pool import Row
from megasora.curation.settings import Limits, ScoreName, ScoreSettings
from megasora.curation.tables import OnProgress, Stage, Summary, clip_schema, run_over_table, with_columns

COLUMNS: dict[ScoreName, tuple[str, ...]] = {
    "motion": ("vmaf_motion",),
    "blur": ("blur_laplacian", "blur_ffmpeg"),
    "light": ("brightness", "dark_share", "bright_share", "black_share"),
    "jitter": ("jitter", "freeze_share"),
    "text": ("text_area",),
    "hashes": ("frame_hashes",),
    "aesthetic": ("aesthetic",),
}
"""Columns each score fills."""

_SMALL_PX = 256
_NUM_FRAMES = 5
"""Frames looked at for blur and hashes. Open-Sora 2.0 report, section 2.1: blur by 5 frames and a majority (the median) of them."""
_TEXT_FRAMES = 3
_TEXT_CONFIDENCE = 0.7
"""Open-Sora 2.0 report, section 2.1."""
_FREEZE_LEVELS = 0.001 * 255
"""Frames that differ by less on average repeat the one before. FFmpeg's freezedetect: noise -60 dB."""
_BLACK_LEVEL = 16
_BLACK_PART = 0.98
"""A frame of which so much is darker than the level is black. FFmpeg's blackdetect: pic_th 0.98."""


def run_score(source: Path, settings: ScoreSettings, *, limits: Limits, on_progress: OnProgress | None = None) -> Summary:
    """Score every row of a shots or probe table.

    Raises:
        UserError: the source is no such table, or the settings cannot work.
    """
    if problem := settings.problems():
        raise UserError(problem)
    schema = clip_schema(source)
    if settings.captioner is not None:
        load_captioner(settings.captioner)
    columns = [name for score in settings.scores for name in COLUMNS[score]]
    stage = Stage(
        name="score",
        work=partial(score_row, settings=settings),
        on_failure=_failure,
        schema=with_columns(schema, *(SCORES.field(name) for name in (*columns, "score_error"))),
        settings={
            "scores": sorted(settings.scores),
            "aesthetic": read_note(settings.aesthetic) if settings.aesthetic else None,
            "captioner": settings.captioner,
        },
    )
    return run_over_table(stage, source, output=settings.output, limits=limits, overwrite=settings.overwrite, on_progress=on_progress)


def _failure(row: Row, reason: str) -> Row:
    """The row of a clip that could not be scored."""
    return {**row, "score_error": reason}


def score_row(row: Row, *, settings: ScoreSettings) -> list[Row]:
    """One clip with its scores; one that is broken or damaged has none."""
    if row["error"]:
        return [{**row, "score_error": ""}]
    try:
        frames = _look(Span.of_row(row), settings)
    except DamagedClipError as damage:
        return [_failure(row, str(damage))]
    scores: Row = {"score_error": ""}
    for name in settings.scores:
        scores |= _FUNCTIONS[name](frames, settings)
    if settings.captioner is not None and not row["text"]:
        pictures = np.stack([picture[:, :, ::-1] for picture in frames.of("caption")])
        scores["text"] = str(load_captioner(settings.captioner)(pictures, row))
    return [{**row, **scores}]


@dataclass
class _Frames:
    """What one pass over a clip leaves for the scores; its size does not grow with the clip's length but for single numbers."""

    full: dict[int, NDArray[np.uint8]]
    """Some frames at their own size, BGR."""
    wanted: dict[str, tuple[int, ...]]
    motion: list[float]
    """vmafmotion of every frame."""
    blur: list[float]
    """blurdetect of some frames; nan on flat ones."""
    light: list[tuple[float, float, float]]
    """(mean luma, dark share, bright share) of every frame."""
    changes: list[tuple[float, float]]
    """(mean change of hue, saturation and value; change of value) from every frame to the next."""

    def of(self, use: str) -> list[NDArray[np.uint8]]:
        """The full frames chosen for a use."""
        return [self.full[number] for number in self.wanted[use]]


def _look(span: Span, settings: ScoreSettings) -> _Frames:
    """Decode a clip once.

    Raises:
        DamagedClipError: it cannot be decoded to its end.
    """
    scores = set(settings.scores)
    wanted = {
        "blur": evenly(span.start, span.end, _NUM_FRAMES),
        "text": evenly(span.start, span.end, _TEXT_FRAMES),
        "aesthetic": tuple(sorted({span.start, (span.start + span.end - 1) // 2, span.end - 1})),
        "caption": evenly(span.start, span.end, settings.captioner_frames),
    }
    users = {"blur": {"blur", "hashes"}, "text": {"text"}, "aesthetic": {"aesthetic"}}
    keep = {number for use, names in users.items() if scores & names for number in wanted[use]}
    if settings.captioner is not None:
        keep |= set(wanted["caption"])
    found = _Frames(full={}, wanted=wanted, motion=[], blur=[], light=[], changes=[])
    small = SmallFrames(long_side=_SMALL_PX, crop=span.crop)
    before: NDArray[np.int16] | None = None
    motion: FilterGraph | None = None
    blur: FilterGraph | None = None
    for number, frame in read_frames(span):
        if "motion" in scores and span.end - span.start > 1:
            motion = motion or FilterGraph(frame, [("vmafmotion", "")], crop=span.crop)
            found.motion.append(float(motion.metadata(frame)["lavfi.vmafmotion.score"]))
        if "blur" in scores and number in wanted["blur"]:
            blur = blur or FilterGraph(frame, [("blurdetect", "")], crop=span.crop)
            found.blur.append(_blurriness(blur, frame))
        if scores & {"light", "jitter"}:
            picture = small(frame)
            found.light.append(_light_of(picture))
            hsv = cv2.cvtColor(picture, cv2.COLOR_BGR2HSV).astype(np.int16)
            if before is not None:
                change = np.abs(hsv - before).mean((0, 1))
                found.changes.append((float(change.mean()), float(change[2])))
            before = hsv
        if number in keep:
            found.full[number] = full_bgr(frame, span.crop)
    return found


def _blurriness(graph: FilterGraph, frame: av.VideoFrame) -> float:
    return float(graph.metadata(frame).get("lavfi.blur", "nan"))


def _motion(frames: _Frames, settings: ScoreSettings) -> Row:
    """libavfilter's vmafmotion, mean without the first frame, which has none before it."""
    return {"vmaf_motion": float(np.mean(frames.motion[1:])) if len(frames.motion) > 1 else None}


def _blur(frames: _Frames, settings: ScoreSettings) -> Row:
    """Variance of the Laplacian: the median of 5 is below a threshold exactly when the majority is."""
    sharpness = [laplacian_variance(picture) for picture in frames.of("blur")]
    measured = [value for value in frames.blur if math.isfinite(value)]
    return {"blur_laplacian": float(np.median(sharpness)), "blur_ffmpeg": float(np.mean(measured)) if measured else None}


def laplacian_variance(picture: NDArray[np.uint8]) -> float:
    """Variance of OpenCV's Laplacian of the grey picture (kernel size 1); low is blurred."""
    return float(cv2.Laplacian(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), cv2.CV_64F).var())


def _light_of(picture: NDArray[np.uint8]) -> tuple[float, float, float]:
    luma = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
    return float(luma.mean() / 255), float((luma < _BLACK_LEVEL).mean()), float((luma > 255 - _BLACK_LEVEL).mean())


def _light(frames: _Frames, settings: ScoreSettings) -> Row:
    brightness, dark, bright = (np.array(values) for values in zip(*frames.light, strict=True))
    return {
        "brightness": float(brightness.mean()),
        "dark_share": float(dark.mean()),
        "bright_share": float(bright.mean()),
        "black_share": float((dark >= _BLACK_PART).mean()),
    }


def _jitter(frames: _Frames, settings: ScoreSettings) -> Row:
    """Change from frame to frame, as PySceneDetect's ContentDetector measures it: mean distance of hue, saturation and value."""
    if not frames.changes:
        return {"jitter": None, "freeze_share": None}
    changes, of_value = (np.array(values) for values in zip(*frames.changes, strict=True))
    return {"jitter": float(changes.mean()), "freeze_share": float((of_value < _FREEZE_LEVELS).mean())}


def _text(frames: _Frames, settings: ScoreSettings) -> Row:
    """Largest share of a frame inside text boxes; overlaps count once."""
    return {"text_area": max(_text_share(picture) for picture in frames.of("text"))}


def _text_share(picture: NDArray[np.uint8]) -> float:
    # all three steps are named in every call: RapidOCR keeps what an earlier call said
    found = _text_engine()(picture, use_det=True, use_cls=False, use_rec=True)
    if found.boxes is None:
        return 0.0
    mask = np.zeros(picture.shape[:2], np.uint8)
    read = zip(found.boxes, found.scores, found.txts, strict=True)
    # fences and windows are found as boxes too; they read as nothing, or as one letter
    sure = [box for box, confidence, text in read if confidence > _TEXT_CONFIDENCE and len(text.strip()) > 1]
    cv2.fillPoly(mask, [np.round(box).astype(np.int32) for box in sure], 1)
    return float(mask.mean())


@lru_cache(maxsize=1)
def _text_engine() -> Any:
    """The text reader, once per process, on one thread. Pictures are scaled down to 960 pixels and never up: its own default scales small
    ones up five times, which costs ten times as much and finds text in fences."""
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            "Global.log_level": "critical",
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "Det.limit_type": "max",
            "Det.limit_side_len": 960,
        }
    )


def _hashes(frames: _Frames, settings: ScoreSettings) -> Row:
    """Facebook's PDQ hash (256 bits) of 5 frames."""
    import pdqhash

    vectors = [pdqhash.compute(np.ascontiguousarray(picture[:, :, ::-1]))[0] for picture in frames.of("blur")]
    return {"frame_hashes": [np.packbits(vector.astype(np.uint8)).tobytes() for vector in vectors]}


def _aesthetic(frames: _Frames, settings: ScoreSettings) -> Row:
    if settings.aesthetic is None:
        raise UserError("--scores aesthetic needs --aesthetic FOLDER")
    return {"aesthetic": _aesthetic_model(settings.aesthetic).score(frames.of("aesthetic"))}


@lru_cache(maxsize=1)
def _aesthetic_model(folder: Path) -> AestheticModel:
    return AestheticModel(folder)


_FUNCTIONS: dict[ScoreName, Callable[[_Frames, ScoreSettings], Row]] = {
    "motion": _motion,
    "blur": _blur,
    "light": _light,
    "jitter": _jitter,
    "text": _text,
    "hashes": _hashes,
    "aesthetic": _aesthetic,
}


@lru_cache(maxsize=1)
def load_captioner(name: str) -> Callable[[NDArray[np.uint8], Row], str]:
    """The user's captioner; its module may stand in the working folder.

    Raises:
        UserError: there is no such function.
    """
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Callable[[NDArray[np.uint8], Row], str] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--captioner {name}: {error}") from error
    return found

"""Cuts files into shots: scene changes, black borders, pieces of at most 8 seconds, as frame ranges or as new files.

Every piece becomes a row, also the ones that are too short: `filter` removes those, so that the report can count them. Ranges cost nothing
and are what training reads by default; new files are for sources that are slow to seek, stored turned or with pixels that are not square,
or far larger than needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector, ContentDetector

from megasora.config.errors import UserError
from megasora.config.files import written_whole
from megasora.curation.columns import PROBE, SHOTS
from megasora.curation.frames import DamagedClipError, FilterGraph, SmallFrames, Span, read_frames
from megasora.curation.pool import Row
from megasora.curation.settings import Limits, ShotsSettings
from megasora.curation.tables import OnProgress, Stage, Summary, clip_schema, run_over_table, with_columns
from megasora.media.display import OddTurnError, is_square, swaps_sides, upright_filters

_SMALL_PX = 256
"""Long side of the frames cuts are looked for in (PySceneDetect works at about this width)."""
_BORDER_EVERY_FRAMES = 8
_BORDER_LUMA = 12
"""A row or column whose mean luma never exceeds this (of 255) in a shot is border. cropdetect's limit, 24 of TV range, is 9."""
_BORDER_MIN_PX = 4
"""Thinner borders are left: encoders pad sizes by a pixel or two."""


def run_shots(source: Path, settings: ShotsSettings, *, limits: Limits, on_progress: OnProgress | None = None) -> Summary:
    """Cut every row of a probe table.

    Raises:
        UserError: the source is no probe table, or the settings cannot work.
    """
    if problem := settings.problems():
        raise UserError(problem)
    schema = clip_schema(source)
    if settings.clips is not None:
        settings.clips.mkdir(parents=True, exist_ok=True)
    stage = Stage(
        name="shots",
        work=partial(cut_row, settings=settings),
        on_failure=_failure,
        schema=with_columns(schema, *(SHOTS.field(name) for name in SHOTS.names if name not in PROBE.names)),
        settings={name: str(value) for name, value in vars(settings).items() if name not in ("output", "overwrite")},
    )
    return run_over_table(stage, source, output=settings.output, limits=limits, overwrite=settings.overwrite, on_progress=on_progress)


def _failure(row: Row, reason: str) -> Row:
    """The row of a file that could not be cut."""
    return {**row, "source_id": row["id"], "error": f"shots: {reason}"}


@dataclass
class _Seen:
    """What one pass over a file found."""

    frames: int = 0
    cuts: list[int] = field(default_factory=list)
    profiles: list[tuple[int, NDArray[np.float32], NDArray[np.float32]]] = field(default_factory=list)
    """(frame, mean luma of every row, of every column) of some frames."""
    damage: DamagedClipError | None = None


def cut_row(row: Row, *, settings: ShotsSettings) -> list[Row]:
    """The shots of one file, as rows."""
    if row["error"]:
        return [{**row, "source_id": row["id"]}]
    seen = _look(row, settings)
    pieces = _pieces(seen, row, settings)
    result = [_shot(row, number, start, end, seen, settings) for number, (start, end) in enumerate(pieces)]
    if seen.damage is not None:
        first = min(seen.damage.frame, seen.frames)
        lost = {**_shot(row, len(result), first, max(first + 1, int(row["num_frames"])), seen, settings), "error": str(seen.damage)}
        result.append(lost)
    if settings.clips is not None:
        result = [_reencoded(shot, settings, settings.clips) for shot in result]
    return result


def _look(row: Row, settings: ShotsSettings) -> _Seen:
    """One pass: cuts and border profiles, up to the first damaged frame."""
    span = Span(path=row["path"], start=0, end=int(row["num_frames"]))
    seen = _Seen()
    finder: _CutFinder | None = None
    small = SmallFrames(long_side=_SMALL_PX, crop=None)
    try:
        for number, frame in read_frames(span):
            finder = finder or _CutFinder(settings, fps=float(row["fps"]), first=frame)
            finder.add(number, frame, small)
            if settings.borders and number % _BORDER_EVERY_FRAMES == 0:
                luma = frame.to_ndarray(format="gray").astype(np.float32)
                seen.profiles.append((number, luma.mean(1), luma.mean(0)))
            seen.frames = number + 1
    except DamagedClipError as damage:
        seen.damage = damage
    seen.cuts = finder.cuts() if finder else []
    return seen


class _CutFinder:
    """A scene detector that is fed frames."""

    def __init__(self, settings: ShotsSettings, *, fps: float, first: av.VideoFrame) -> None:
        self._fps = fps
        self._found: list[int] = []
        self._graph: FilterGraph | None = None
        self._detector: Any = None
        threshold = settings.threshold
        shortest = max(1, round(0.4 * fps))  # PySceneDetect's own 0.6 s would swallow quick cuts; below this it is a flash
        if settings.detector == "adaptive":
            self._detector = AdaptiveDetector(adaptive_threshold=3.0 if threshold is None else threshold, min_scene_len=shortest)
        elif settings.detector == "content":
            self._detector = ContentDetector(threshold=27.0 if threshold is None else threshold, min_scene_len=shortest)
        else:
            self._graph = FilterGraph(first, [("scdet", f"threshold={10.0 if threshold is None else threshold}")])
        self._last: FrameTimecode | None = None

    def add(self, number: int, frame: av.VideoFrame, small: SmallFrames) -> None:
        """Look at the next frame."""
        if self._graph is not None:
            if "lavfi.scd.time" in self._graph.metadata(frame):
                self._found.append(number)
            return
        self._last = FrameTimecode(number, fps=self._fps)
        self._found += [cut.frame_num for cut in self._detector.process_frame(self._last, small(frame))]

    def cuts(self) -> list[int]:
        """Numbers of the first frames after cuts."""
        late = self._detector.post_process(self._last) if self._detector is not None and self._last is not None else []
        return sorted({*self._found, *(cut.frame_num for cut in late)} - {0})


def _pieces(seen: _Seen, row: Row, settings: ShotsSettings) -> Iterator[tuple[int, int]]:
    """[start, end) of every piece; shots longer than max_seconds are cut into pieces of that length and a rest."""
    edges = [0, *(cut for cut in seen.cuts if cut < seen.frames), seen.frames]
    longest = max(1, int(settings.max_seconds * float(row["fps"]) + 1e-6)) if row["media"] == "video" else seen.frames
    for start, end in zip(edges, edges[1:], strict=False):
        for first in range(start, end, longest):
            yield first, min(first + longest, end)


def _shot(row: Row, number: int, start: int, end: int, seen: _Seen, settings: ShotsSettings) -> Row:
    crop = _inside_borders(seen.profiles, start, end) if settings.borders else None
    height, width = (crop[3], crop[2]) if crop else (row["height"], row["width"])
    return {
        **row,
        "id": f"{row['id']}-{number:03d}",
        "source_id": row["id"],
        "start_frame": start,
        "end_frame": end,
        "num_frames": end - start,
        "duration_s": (end - start) / row["fps"] if row["media"] == "video" else 0.0,
        "aspect_ratio": height / width,
        "resolution": height * width,
        **dict(zip(("crop_x", "crop_y", "crop_w", "crop_h"), crop or (None,) * 4, strict=True)),
    }


def _inside_borders(
    profiles: list[tuple[int, NDArray[np.float32], NDArray[np.float32]]], start: int, end: int
) -> tuple[int, int, int, int] | None:
    """(x, y, width, height) inside black borders, even numbers; None without borders, or when all is black."""
    inside = [profile for profile in profiles if start <= profile[0] < end]
    if not inside:
        return None
    rows = np.max([profile[1] for profile in inside], axis=0)
    columns = np.max([profile[2] for profile in inside], axis=0)
    top, bottom, left, right = 0, len(rows), 0, len(columns)
    for _ in range(2):  # black rows pull down the means of columns and the other way round: measure each inside the other's borders
        top, bottom = _lit(rows * len(columns) / max(1, right - left))
        left, right = _lit(columns * len(rows) / max(1, bottom - top))
    if (top, bottom, left, right) == (0, len(rows), 0, len(columns)) or bottom <= top or right <= left:
        return None
    top, left = top + top % 2, left + left % 2
    height, width = (bottom - top) // 2 * 2, (right - left) // 2 * 2
    return (left, top, width, height) if height >= 16 and width >= 16 else None


def _lit(profile: NDArray[np.float32]) -> tuple[int, int]:
    """[first, last) of a profile that is no border; a border thinner than the minimum counts as picture."""
    lit = np.flatnonzero(profile > _BORDER_LUMA)
    if not len(lit):
        return 0, 0
    first, end = int(lit[0]), int(lit[-1]) + 1
    return (first if first >= _BORDER_MIN_PX else 0), (end if len(profile) - end >= _BORDER_MIN_PX else len(profile))


def _reencoded(shot: Row, settings: ShotsSettings, folder: Path) -> Row:
    """The shot as a file of its own; too short ones, images and damaged ones stay ranges of their source."""
    if shot["error"] or shot["media"] != "video" or shot["duration_s"] < settings.min_seconds:
        return shot
    path = (folder / shot["id"][:2] / f"{shot['id']}.mp4").absolute()
    path.parent.mkdir(exist_ok=True)
    try:
        frames, height, width, fps = _encode(shot, path, settings)
    except (DamagedClipError, OddTurnError) as error:
        return {**shot, "error": str(error)}
    return {
        **shot,
        "path": str(path),
        "start_frame": 0,
        "end_frame": frames,
        "num_frames": frames,
        "fps": fps,
        "height": height,
        "width": width,
        "aspect_ratio": height / width,
        "resolution": height * width,
        "rotation": 0,
        "sample_aspect_ratio": 1.0,
        "variable_fps": False,
        **dict.fromkeys(("crop_x", "crop_y", "crop_w", "crop_h")),
    }


def _encode(shot: Row, path: Path, settings: ShotsSettings) -> tuple[int, int, int, float]:
    """Write a shot as H.264; returns frames, height, width, frames per second. The file appears only when complete."""
    span = Span.of_row(shot)
    stride = max(1, int(np.ceil(shot["fps"] / settings.max_fps - 1e-6)))
    rate = Fraction(shot["fps"]).limit_denominator(1001) / stride
    graph: av.filter.Graph | None = None
    stream: Any = None
    count = 0
    with written_whole(path) as temporary:  # noqa: SIM117 (one reason a line)
        with av.open(str(temporary), "w") as container:
            for number, frame in read_frames(span):
                if (number - span.start) % stride:
                    continue
                if graph is None:
                    graph, width, height = _shape_graph(frame, span, float(shot["sample_aspect_ratio"]), settings.max_long_side)
                    stream = container.add_stream(
                        "libx264", rate=rate, options={"crf": str(settings.crf), "preset": "fast", "threads": "1"}
                    )
                    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                graph.push(frame)
                made = graph.pull()
                made.pts, made.time_base = count, 1 / rate
                made.pict_type = av.video.frame.PictureType.NONE
                container.mux(stream.encode(made))
                count += 1
            container.mux(stream.encode())
    return count, stream.height, stream.width, float(rate)


def _shape_graph(frame: av.VideoFrame, span: Span, aspect: float, long_side: int) -> tuple[av.filter.Graph, int, int]:
    """(graph that crops, turns upright, makes pixels of this aspect square and scales, width, height)."""
    _, _, stored_width, height = span.crop or (0, 0, frame.width, frame.height)
    width = stored_width if is_square(aspect) else stored_width * aspect
    graph = av.filter.Graph()
    chain = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)]
    if span.crop:
        chain.append(graph.add("crop", f"{stored_width}:{height}:{span.crop[0]}:{span.crop[1]}:exact=1"))
    turn = upright_filters(frame)
    chain += [graph.add(name, arguments) for name, arguments in turn]
    if swaps_sides(turn):
        width, height = height, width
    scale = min(1.0, long_side / max(width, height))
    width, height = (max(2, round(edge * scale / 2) * 2) for edge in (width, height))
    chain += [graph.add("scale", f"{width}:{height}:flags=bicubic"), graph.add("format", "yuv420p"), graph.add("buffersink")]
    graph.link_nodes(*chain).configure()
    return graph, width, height

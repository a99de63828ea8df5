"""One page about a filter run: how many clips each rule removed, where the scores lie, what kept and removed clips look like.

The page is one HTML file with everything in it, made from the manifest, the table of removed clips and the record that `filter` wrote.
"""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import cv2
import duckdb
import numpy as np
from jinja2 import Environment, PackageLoader
from numpy.typing import NDArray

from megasora.config.errors import UserError
from megasora.config.files import refuse_existing, written_whole
from megasora.curation.frames import DamagedClipError, SmallFrames, Span, read_frames
from megasora.curation.pool import Row
from megasora.curation.selection import record_file, removed_table
from megasora.curation.settings import ReportSettings
from megasora.curation.tables import table_schema

_PICTURE_PX = 176
_BINS = 40
_SHOWN = (0.005, 0.995)
"""Histograms show the values between these quantiles; the tails are counted in a note."""

HISTOGRAMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "duration_s": ("Length, seconds", ("min_duration_s", "max_duration_s")),
    "fps": ("Frames per second", ("min_fps",)),
    "bits_per_pixel": ("Bits per pixel", ("min_bits_per_pixel",)),
    "aspect_ratio": ("Height / width", ()),
    "vmaf_motion": ("Motion (vmafmotion)", ("min_vmaf_motion", "max_vmaf_motion")),
    "blur_laplacian": ("Sharpness (variance of the Laplacian)", ("min_blur_laplacian",)),
    "brightness": ("Brightness, 0 to 1", ()),
    "dark_share": ("Share of dark pixels", ("max_dark_share",)),
    "bright_share": ("Share of white pixels", ("max_bright_share",)),
    "jitter": ("Change from frame to frame, of 255", ("max_jitter",)),
    "freeze_share": ("Share of repeated frames", ("max_freeze_share",)),
    "text_area": ("Share of a frame under text", ("max_text_area",)),
    "aesthetic": ("Aesthetic score", ("min_aesthetic",)),
}
"""Column -> (words, the rules whose thresholds are drawn)."""

_LOGARITHMIC = ("bits_per_pixel", "blur_laplacian")
GROUPS = {
    "Codec": "coalesce(codec, 'unknown')",
    "Shorter side, pixels": "CASE WHEN side < 160 THEN 'below 160' WHEN side < 256 THEN '160 to 255' WHEN side < 496 THEN '256 to 495' "
    "WHEN side < 720 THEN '496 to 719' WHEN side >= 720 THEN '720 and more' ELSE 'unknown' END",
    "Length": "CASE WHEN media = 'image' THEN 'image' WHEN duration_s < 2 THEN 'below 2 s' WHEN duration_s < 4 THEN '2 to 4 s' "
    "WHEN duration_s < 6 THEN '4 to 6 s' WHEN duration_s >= 6 THEN '6 s and more' ELSE 'unknown' END",
    "Shape": "CASE WHEN aspect_ratio < 0.9 THEN 'wide' WHEN aspect_ratio <= 1.1 THEN 'square' WHEN aspect_ratio > 1.1 THEN 'tall' "
    "ELSE 'unknown' END",
}
"""Words -> SQL of the groups that are counted before and after."""


def run_report(source: Path, settings: ReportSettings) -> Path:
    """Write the page about a manifest that `filter` wrote.

    Raises:
        UserError: the manifest has no record or no table of removed clips beside it, or the page cannot be written.
    """
    if settings.output.suffix not in (".html", ".htm"):
        raise UserError(f"--output {settings.output} must end in .html")
    if not settings.overwrite:
        refuse_existing(settings.output, cure="give --overwrite or another name")
    record = _record(source)
    columns = set(table_schema(source).names)
    table_schema(removed_table(source))
    with duckdb.connect() as database:
        database.execute(
            "CREATE VIEW clips AS SELECT *, removed_by IS NULL AS kept, sqrt(resolution * least(aspect_ratio, 1 / aspect_ratio)) AS side "
            f"FROM (SELECT *, NULL AS removed_by FROM read_parquet({_quoted(source)}) "
            f"UNION ALL BY NAME SELECT * EXCLUDE (failed_rules, duplicate_of) FROM read_parquet({_quoted(removed_table(source))}))"
        )
        histograms = [
            _histogram(database, column, words, [record["rules"][rule] for rule in rules if record["rules"][rule] is not None])
            for column, (words, rules) in HISTOGRAMS.items()
            if column in columns
        ]
        groups = [(words, _group(database, sql)) for words, sql in GROUPS.items()]
        examples = [("Kept", "", _examples(database, "kept", None, settings.examples))]
        for rule in record["result"]["rules"]:
            if rule["removed"]:
                column = _column_of(rule["name"])
                shown = column if column in columns else None
                found = _examples(database, f"removed_by = '{rule['name']}'", shown, settings.examples)
                examples.append((rule["name"], rule["reason"], found))
    page = (
        Environment(loader=PackageLoader("megasora.curation", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .get_template("report.html.j2")
        .render(
            record=record,
            result=record["result"],
            funnel=_funnel(record["result"]),
            histograms=[histogram for histogram in histograms if histogram],
            groups=groups,
            examples=examples,
            source=source.name,
        )
    )
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(settings.output) as temporary:
        temporary.write_text(page)
    return settings.output


def _record(source: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(record_file(source).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source} has no record {record_file(source).name} beside it: give the manifest that megasora data filter wrote"
        ) from error
    return content


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


def _column_of(rule: str) -> str | None:
    """The column a rule looks at, for the caption of its pictures."""
    from megasora.curation.rules import FilterRules, active_rules

    everything = FilterRules(max_duration_s=0.0, min_aesthetic=0.0, even_fps=True, captioned=True)
    named = {found.name: found.column for found in active_rules(everything)}
    return {**named, "broken": "error", "unscored": "score_error"}.get(rule) or None


def _funnel(result: dict[str, Any]) -> list[dict[str, Any]]:
    """How many clips are left after each rule that removed some."""
    left = result["clips"]
    steps = [{"words": "all clips", "left": left, "removed": 0, "share": 1.0}]
    for rule in result["rules"]:
        if rule["removed"]:
            left -= rule["removed"]
            steps.append({"words": rule["reason"], "left": left, "removed": rule["removed"], "share": left / result["clips"]})
    return steps


def _histogram(database: duckdb.DuckDBPyConnection, column: str, words: str, limits: list[float]) -> dict[str, Any] | None:
    """Bars of all and of kept clips, as coordinates of an SVG of 360 x 120."""
    found = database.execute(f"SELECT {column}, kept FROM clips WHERE {column} IS NOT NULL AND NOT isnan({column})").fetchnumpy()
    values, kept = np.asarray(found[column], np.float64), np.asarray(found["kept"], bool)
    if not len(values):
        return None
    scale = (lambda x: np.log10(np.maximum(x, 1e-6))) if column in _LOGARITHMIC else (lambda x: x)
    low, high = np.quantile(values, _SHOWN)
    low, high = min([low, *limits]), max([high, *limits])
    outside = int(((values < low) | (values > high)).sum())
    start, end = float(scale(np.array(low))), float(scale(np.array(high)))
    if end <= start:
        start, end = start - 0.5, end + 0.5
    edges = np.linspace(start, end, _BINS + 1)
    inside = scale(np.clip(values, low, high))
    everything, good = np.histogram(inside, edges)[0], np.histogram(inside[kept], edges)[0]
    top = max(1, int(everything.max()))

    def x(value: float) -> float:
        return round((float(scale(np.array(value))) - start) / (end - start) * 360, 1)

    return {
        "words": words,
        "logarithmic": column in _LOGARITHMIC,
        "all": _bars(everything, top),
        "kept": _bars(good, top),
        "top": top,
        "ticks": [(x(value), f"{value:g}") for value in _ticks(start, end, column in _LOGARITHMIC)],
        "limits": [(x(limit), f"{limit:g}") for limit in limits],
        "outside": outside,
        "median": f"{float(np.median(values)):.3g}",
        "median_kept": f"{float(np.median(values[kept])):.3g}" if kept.any() else "none",
    }


def _bars(counts: NDArray[np.int64], top: int) -> list[tuple[float, float, float]]:
    """(x, y, height) of every bar that is not empty."""
    width = 360 / len(counts)
    heights = np.maximum(counts / top * 110, 1.0)  # one clip in a million is still seen
    return [(round(n * width, 1), round(110 - h, 1), round(float(h), 1)) for n, (c, h) in enumerate(zip(counts, heights, strict=True)) if c]


def _ticks(start: float, end: float, logarithmic: bool) -> list[float]:
    """Four to seven round numbers of the axis."""
    if logarithmic:
        powers = [10.0**p for p in range(math.ceil(start - 1e-9), math.floor(end + 1e-9) + 1)]
        return powers if len(powers) > 1 else [float(f"{10**p:.2g}") for p in np.linspace(start, end, 4)]
    raw = (end - start) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = min((m * unit for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    return [round(k * step, 10) for k in range(math.ceil(start / step - 1e-9), math.floor(end / step + 1e-9) + 1)]


def _group(database: duckdb.DuckDBPyConnection, sql: str) -> list[tuple[str, int, int]]:
    """(name, clips, kept clips) of the ten largest groups."""
    return [
        (str(name), int(count), int(kept))
        for name, count, kept in database.execute(
            f"SELECT {sql} AS name, count(*), count(*) FILTER (kept) FROM clips GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 10"
        ).fetchall()
    ]


def _examples(database: duckdb.DuckDBPyConnection, condition: str, column: str | None, count: int) -> list[dict[str, str]]:
    """Pictures of some clips, chosen by the hash of their id: always the same ones, from all over the table."""
    shown = f", {column} AS shown" if column else ", NULL AS shown"
    found = database.execute(f"SELECT *{shown} FROM clips WHERE {condition} ORDER BY hash(id), id LIMIT {count}")
    names = [entry[0] for entry in found.description]
    rows = [dict(zip(names, values, strict=True)) for values in found.fetchall()]
    return [{"id": row["id"], "file": Path(row["path"]).name, "shown": _shown(row["shown"]), **_picture(row)} for row in rows]


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _picture(row: Row) -> dict[str, str]:
    """The middle frame as a data URI, or why there is none."""
    if row["num_frames"] is None:
        return {"picture": "", "why": row["error"] or "no frames"}
    span = Span.of_row(row)
    middle = (span.start + span.end) // 2
    small = SmallFrames(long_side=_PICTURE_PX, crop=span.crop)
    try:
        for _, frame in read_frames(Span(path=span.path, start=middle, end=middle + 1, crop=span.crop)):
            done, data = cv2.imencode(".jpg", small(frame), [cv2.IMWRITE_JPEG_QUALITY, 80])
            if done:
                return {"picture": "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode(), "why": ""}
    except DamagedClipError as damage:
        return {"picture": "", "why": str(damage)}
    return {"picture": "", "why": "the middle frame is missing"}

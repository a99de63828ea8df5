"""The manifest: a csv or parquet table of clips, checked row by row. Bad rows are skipped, counted and named; a bad table is refused.

Columns (Open-Sora's): path, text, num_frames, height, width, aspect_ratio, resolution, fps; optional id, start_frame, end_frame, crop_x,
crop_y, crop_w, crop_h, motion scores. Relative paths count from the manifest. Other columns are named in `Manifest.unread`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasora.config.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

REQUIRED = ("path", "text", "num_frames", "height", "width", "fps")
"""Columns no clip can do without (aspect_ratio and resolution follow from height and width)."""
MOTION_COLUMNS = ("score_vmafmotion", "vmaf_motion", "motion")
"""Columns a motion score is read from, the first that has one: the published tables' (hpcaitech/Open-Sora opensora/datasets/datasets.py,
which reads no other score), ours, and a plain name."""
KNOWN = (
    *REQUIRED,
    *MOTION_COLUMNS,
    *("aspect_ratio", "resolution"),
    *("id", "start_frame", "end_frame", "crop_x", "crop_y", "crop_w", "crop_h"),
)
"""Columns that have a meaning here; aspect_ratio and resolution are computed again from height and width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One usable row."""

    id: str
    path: str
    text: str
    num_frames: int
    """Frames from start_frame on."""
    height: int
    width: int
    fps: float
    """nan where the table does not say; a caption then names no rate."""
    start_frame: int = 0
    crop: tuple[int, int, int, int] | None = None
    """(x, y, width, height) in source pixels, cut before resizing."""
    motion_score: float | None = None
    row: int = 0
    """Number of its row in the manifest, from 0."""


@dataclass(frozen=True, kw_only=True)
class SkippedRow:
    """A row that cannot be used, and why."""

    row: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The usable clips of a table, in its order."""

    clips: tuple[Clip, ...]
    skipped: tuple[SkippedRow, ...]
    sha256: str
    """Hash of the file: a resume on another table is noticed."""
    unread: tuple[str, ...] = ()
    """Columns that nothing here reads, in the table's order."""


def read_manifest(path: str | Path) -> Manifest:
    """Read a csv or parquet manifest.

    Raises:
        UserError: the file is missing, unreadable, lacks a required column or has no usable row.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read manifest {path}: {error.strerror}; check --data.manifest") from error
    rows, columns, skipped = _read_table(path)
    missing = [column for column in REQUIRED if column not in columns]
    if missing:
        raise UserError(f"manifest {path} lacks the columns {', '.join(missing)}; it has {', '.join(columns)}")
    clips: list[Clip] = []
    for number, row in rows:
        try:
            clips.append(_clip(row, number, path.parent))
        except ValueError as error:
            skipped.append(SkippedRow(row=number, reason=str(error)))
    skipped.sort(key=lambda one: one.row)
    if not clips:
        first = f" (row {skipped[0].row}: {skipped[0].reason})" if skipped else ""
        raise UserError(f"manifest {path} has no usable row{first}")
    unread = tuple(column for column in columns if column not in KNOWN)
    return Manifest(clips=tuple(clips), skipped=tuple(skipped), sha256=hashlib.sha256(content).hexdigest(), unread=unread)


def _read_table(path: Path) -> tuple[Iterator[tuple[int, Mapping[str, Any]]], list[str], list[SkippedRow]]:
    """(row number, row) of the rows, names of the columns, and the rows that have another number of cells."""
    import pyarrow as pa
    from pyarrow import parquet

    skipped: list[SkippedRow] = []
    try:
        table = parquet.read_table(path) if path.suffix == ".parquet" else _read_csv(path, skipped)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"manifest {path} is not a readable csv or parquet table: {str(error).splitlines()[0]}") from error
    rows = (row for batch in table.to_batches() for row in batch.to_pylist())
    gone = {one.row for one in skipped}
    return zip((number for number in count() if number not in gone), rows, strict=False), table.column_names, skipped


def _read_csv(path: Path, skipped: list[SkippedRow]) -> pa.Table:
    """The rows that have as many cells as the header; the others are added to `skipped`.

    pyarrow counts rows, not lines: 1 is the header, empty lines and line breaks in a cell do not count. It knows the number only without
    threads.
    """
    import pyarrow as pa
    from pyarrow import csv

    def skip(row: csv.InvalidRow) -> str:
        reason = f"{row.actual_columns} cells instead of {row.expected_columns}; put cells that contain commas in quotes"
        skipped.append(SkippedRow(row=row.number - 2, reason=reason))
        return "skip"

    # every column as text: a number is checked where it is used, and one bad cell costs one row
    unnoticed = csv.ParseOptions(newlines_in_values=True, invalid_row_handler=lambda _: "skip")
    with path.open("rb") as file:
        header = csv.open_csv(file, parse_options=unnoticed).schema.names
    return csv.read_csv(
        path,
        read_options=csv.ReadOptions(use_threads=False),
        parse_options=csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
        convert_options=csv.ConvertOptions(column_types={name: pa.string() for name in header}, strings_can_be_null=True),
    )


def _clip(row: Mapping[str, Any], number: int, folder: Path) -> Clip:
    path = str(row["path"] or "")
    if not path:
        raise ValueError("path is empty")
    start = int(_number(row, "start_frame", default=0.0))
    frames = int(_number(row, "num_frames"))
    end = _number(row, "end_frame", default=float(start + frames))
    num_frames = min(frames, int(end) - start)
    height, width, fps = int(_number(row, "height")), int(_number(row, "width")), _number(row, "fps", default=math.nan)
    if num_frames < 1 or height < 1 or width < 1 or fps <= 0 or start < 0:
        raise ValueError(f"num_frames {num_frames}, height {height}, width {width}, fps {fps} and start {start} must be positive")
    crop = None
    if row.get("crop_w") not in (None, ""):
        crop = tuple(int(_number(row, f"crop_{part}")) for part in ("x", "y", "w", "h"))
        if crop[0] < 0 or crop[1] < 0 or crop[2] < 1 or crop[3] < 1 or crop[0] + crop[2] > width or crop[1] + crop[3] > height:
            raise ValueError(f"crop {crop} does not lie inside {width}x{height}")
    motion = next((_number(row, column) for column in MOTION_COLUMNS if not _is_empty(row.get(column))), None)
    return Clip(
        id=str(number if _is_empty(row.get("id")) else row["id"]),
        path=str(folder / path),
        text=str(row["text"] or ""),
        num_frames=num_frames,
        height=height,
        width=width,
        fps=fps,
        start_frame=start,
        crop=crop,  # type: ignore[arg-type]
        motion_score=motion,
        row=number,
    )


def _is_empty(value: object) -> bool:
    """Nothing, or the 'nan' that pandas writes for it."""
    return value in (None, "") or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and value.lower() == "nan")


def _number(row: Mapping[str, Any], column: str, *, default: float | None = None) -> float:
    value = row.get(column)
    if _is_empty(value):
        if default is None:
            raise ValueError(f"{column} is empty")
        return default
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{column} is not a number: {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{column} is {number}")
    return number

"""Container facts of every file of a folder or a list: the first table of the pyramid.

The packets are counted and weighed without decoding (reading speed, not decoding speed), which finds truncated files and gives exact bits
per pixel; the first frame is decoded, which finds a codec that is not there and a picture that is stored turned.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np

from megasora.config.errors import UserError
from megasora.curation.columns import PROBE
from megasora.curation.pool import Row
from megasora.curation.settings import Limits, ProbeSettings
from megasora.curation.tables import OnProgress, Stage, Summary, any_table_rows, run_stage
from megasora.media.display import pixel_aspect

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".flv", ".wmv", ".gif", ".3gp", ".ogv")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_UNEVEN = 0.5
"""Frames whose time stamps are off the even grid by more than this part of a frame make a variable rate."""


def run_probe(source: Path, settings: ProbeSettings, *, limits: Limits, on_progress: OnProgress | None = None) -> tuple[Summary, int]:
    """Probe every file; returns what was done, and how many files of the folder have another ending than a clip's.

    Raises:
        UserError: the source is missing or holds no clip.
    """
    rows, ignored = _listed(source, settings.captions) if source.is_file() else _found(source)
    stage = Stage(
        name="probe",
        work=partial(probe_row, sidecar=settings.captions == "sidecar"),
        on_failure=_failure,
        schema=PROBE,
        settings={"captions": settings.captions},
    )
    return (
        run_stage(
            stage, rows, total=len(rows), output=settings.output, limits=limits, overwrite=settings.overwrite, on_progress=on_progress
        ),
        ignored,
    )


def clip_id(name: str) -> str:
    """Id of a file from its path below the probed folder."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _found(folder: Path) -> tuple[list[Row], int]:
    if not folder.is_dir():
        raise UserError(f"{folder} is neither a folder of clips nor a table of them")
    rows: list[Row] = []
    ignored = 0
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(place, name)
            if path.suffix.lower() in VIDEO_SUFFIXES + IMAGE_SUFFIXES and not name.startswith("."):
                relative = str(path.relative_to(folder))
                rows.append({"id": clip_id(relative), "path": str(path.absolute()), "text": ""})
            elif path.suffix.lower() not in (".txt", ".json"):
                ignored += 1
    if not rows:
        raise UserError(f"{folder} holds no clip ({', '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)})")
    return rows, ignored


def _listed(table: Path, captions: str) -> tuple[list[Row], int]:
    found = any_table_rows(table)
    column = "text" if captions in ("sidecar", "none") else captions
    if found and "path" not in found[0]:
        raise UserError(f"{table} has no column path; it has {', '.join(found[0])}")
    if found and captions not in ("sidecar", "none") and column not in found[0]:
        raise UserError(f"{table} has no column {column!r} for --captions; it has {', '.join(found[0])}")
    rows: list[Row] = []
    for row in found:
        if not row["path"]:
            raise UserError(f"{table}: row {len(rows)} has no path")
        path = table.parent / str(row["path"])
        rows.append(
            {"id": str(row.get("id") or clip_id(str(row["path"]))), "path": str(path.absolute()), "text": str(row.get(column) or "")}
        )
    return rows, 0


def _failure(row: Row, reason: str) -> Row:
    """The row of a file that could not be probed."""
    return {**{field.name: None for field in PROBE}, **row, "media": _media(row["path"]), "error": reason}


def _media(path: str) -> str:
    return "image" if Path(path).suffix.lower() in IMAGE_SUFFIXES else "video"


def probe_row(row: Row, *, sidecar: bool) -> list[Row]:
    """Facts of one file; a damaged one gets its reason in `error`."""
    path = str(row["path"])
    text = str(row.get("text") or "") or (_sidecar_caption(Path(path)) if sidecar else "")
    known = {**row, "text": text}
    try:
        size = os.stat(path).st_size
        known["file_bytes"] = size
        return [{**_failure(known, ""), **(_facts(path) if size else {"error": "the file is empty"})}]
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        return [_failure(known, _words(error))]


def _words(error: Exception) -> str:
    """FFmpeg's reason without the path, which the row has."""
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0].split(": '")[0]


@dataclass(frozen=True)
class _Packets:
    """What the packets of a stream say together."""

    frames: int
    bytes: int
    uneven: bool
    damage: str


def _facts(path: str) -> Row:
    """Facts from header, packets and first frame."""
    with av.open(path) as container:
        if not container.streams.video:
            return {"error": "no video stream"}
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        header_frames, codec = stream.frames, stream.codec_context
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        first, first_error = _first_frame(container, stream)
        height, width = (first.height, first.width) if first is not None else (codec.height, codec.width)
        facts: Row = {
            "codec": codec.name,
            "profile": codec.profile or "",
            "pix_fmt": codec.pix_fmt or "",
            "height": height,
            "width": width,
            "rotation": int(first.rotation) if first is not None else 0,
            "sample_aspect_ratio": pixel_aspect(stream),
            "aspect_ratio": height / width if width else None,
            "resolution": height * width,
        }
    if _media(path) == "image":
        still = {"num_frames": 1, "fps": 1.0, "duration_s": 0.0, "variable_fps": False, "bits_per_pixel": None}
        return {**facts, **still, "error": first_error}
    packets = _packets(path, rate)
    frames = packets.frames
    error = packets.damage
    if not error and header_frames and frames < header_frames:
        error = f"truncated: {frames} of {header_frames} frames"
    error = error or first_error or ("" if frames else "no frames") or ("" if rate > 0 else "no frame rate")
    return {
        **facts,
        "num_frames": frames,
        "fps": rate,
        "duration_s": frames / rate if rate else 0.0,
        "bits_per_pixel": 8 * packets.bytes / (frames * height * width) if frames and height and width else None,
        "variable_fps": packets.uneven,
        "error": error,
    }


def _first_frame(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[av.VideoFrame | None, str]:
    """(first frame, why there is none)."""
    try:
        first = next(container.decode(stream), None)
    except av.error.FFmpegError as error:
        return None, f"the first frame cannot be decoded: {_words(error)}"
    return first, "" if first is not None else "no frame can be decoded"


def _packets(path: str, rate: float) -> _Packets:
    """Count and weigh the packets of the first video stream."""
    frames = size = 0
    stamps: list[int] = []
    damage = ""
    with av.open(path) as container:
        stream = container.streams.video[0]
        base = float(stream.time_base or 0)
        expected = os.stat(path).st_size
        reached = 0
        try:
            for packet in container.demux(stream):
                if packet.size == 0 or packet.is_discard:
                    continue
                if packet.is_corrupt:
                    damage = damage or f"packet {frames} is corrupt"
                frames += 1
                size += packet.size
                reached = max(reached, (packet.pos or 0) + packet.size)
                if packet.pts is not None:
                    stamps.append(packet.pts)
        except av.error.FFmpegError as error:
            damage = damage or f"after {frames} frames: {_words(error)}"
        if not damage and reached > expected:
            damage = f"truncated: a frame ends at byte {reached} of {expected}"
        if not damage and container.duration and rate and container.format.name.startswith("matroska"):
            # no frame count in the header: the length it promises tells
            promised = container.duration / av.time_base * rate
            if frames < 0.9 * promised - 2:
                damage = f"truncated: {frames} of about {promised:.0f} frames"
    return _Packets(frames=frames, bytes=size, uneven=_is_uneven(stamps, base, rate), damage=damage)


def _is_uneven(stamps: list[int], base: float, rate: float) -> bool:
    if len(stamps) < 3 or not base or not rate:
        return False
    seconds = np.sort(np.array(stamps)) * base
    grid = (seconds - seconds[0]) * rate
    return bool(np.abs(grid - np.arange(len(grid))).max() > _UNEVEN)


def _sidecar_caption(path: Path) -> str:
    """Caption from <name>.txt or <name>.json; empty when there is none."""
    plain, structured = path.with_suffix(".txt"), path.with_suffix(".json")
    if plain.is_file():
        return plain.read_text(encoding="utf-8", errors="replace").strip()
    if structured.is_file():
        try:
            content = json.loads(structured.read_text(encoding="utf-8", errors="replace"))
        except ValueError:
            return ""
        if isinstance(content, dict):
            return str(content.get("text") or content.get("caption") or "").strip()
    return ""

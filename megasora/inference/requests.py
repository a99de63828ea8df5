"""What clips are asked for: one per row of a table, or per prompt of the command line."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megasora.config.errors import UserError
from megasora.config.latent_frames import frame_rule, is_frame_count, nearest_frame_count
from megasora.config.schema import ModelConfig, RunConfig
from megasora.inference.sizes import size_named
from megasora.models.sampler import ClipSize

Kind = Literal["t2v", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail", "v2v_head_easy", "v2v_tail_easy"]
KINDS: tuple[str, ...] = get_args(Kind)
COLUMNS = (
    *("prompt", "negative", "image", "end_image", "video", "kind", "seed", "resolution", "aspect", "height", "width"),
    *("num_frames", "name"),
)
PUBLISHED_COLUMNS = {"text": "prompt", "neg": "negative", "frames": "num_frames", "size": "resolution"}
"""Other names of columns (Open-Sora's tables: text, neg, ref); `ref` is taken apart by the kind."""


@dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """One clip that is asked for."""

    row: int
    """Number of its row or prompt, from 0."""
    name: str
    """Of its files, without ending."""
    prompt: str
    negative: str
    kind: Kind
    image: Path | None
    """First frame of i2v_head and i2v_loop."""
    end_image: Path | None
    """Last frame of i2v_tail and i2v_loop."""
    video: Path | None
    """Given frames of v2v."""
    seed: int
    size: ClipSize
    aspect: str | None
    """Name of its aspect ratio, when it was asked for by name."""
    motion_score: float | None = None
    """Its own; None takes the run's."""
    picture_prompt: str | None = None
    """Prompt of a first frame that is drawn; None takes the clip's."""
    refined_from: str | None = None
    """The prompt before a language model rewrote it; None when it is as it was."""
    refinement: Mapping[str, Any] | None = None
    """Who was asked and what failed; None when nobody was asked."""

    @property
    def sources(self) -> tuple[Path, ...]:
        """Files of its given frames."""
        return tuple(path for path in (self.image, self.end_image, self.video) if path is not None)


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """A row that cannot be drawn, and why."""

    row: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Common:
    """What rows take where they say nothing of their own."""

    kind: Kind | None
    negative: str
    resolution: str | None
    aspect: str | None
    num_samples: int
    """Clips per row, with seeds that follow one another."""


def read_requests(table: Path, *, config: RunConfig, common: Common) -> tuple[list[ClipRequest], list[Unusable]]:
    """The clips of a csv, parquet, json (a list of objects) or jsonl table, and the rows that cannot be drawn.

    Raises:
        UserError: the table cannot be read, has an unknown column, no prompts, or a name twice.
    """
    rows = _rows(table)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    known = (*COLUMNS, *PUBLISHED_COLUMNS, "ref")
    for column in columns:
        if column not in known:
            near = difflib.get_close_matches(column, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"{table} has an unknown column {column!r}: {hint}")
    if not {"prompt", "text"} & set(columns):
        raise UserError(f"{table} has no column prompt (or text); it has {', '.join(columns) or 'none'}")
    made: list[ClipRequest] = []
    unusable: list[Unusable] = []
    for number, row in enumerate(rows):
        try:
            made += requests_of(_plain(row, common.kind), number=number, config=config, common=common, folder=table.parent)
        except UserError as error:
            unusable.append(Unusable(row=number, reason=str(error)))
    _refuse_twins(made, table)
    return made, unusable


def requests_of(row: Mapping[str, Any], *, number: int, config: RunConfig, common: Common, folder: Path) -> list[ClipRequest]:
    """The clips of one row: num_samples of them, with the row's seed (or the run's plus the row's number) and the next ones.

    Raises:
        UserError: a value or a file is not what the kind needs.
    """
    image, end_image, video = (_file(row, column, folder) for column in ("image", "end_image", "video"))
    kind = _kind(row.get("kind") or common.kind, image=image, end_image=end_image, video=video)
    if kind == "i2v_loop":
        image, end_image = image or end_image, end_image or image
    size, aspect = _size(row, config=config, common=common)
    prompt = str(row.get("prompt") or "").strip()
    if not prompt:
        raise UserError("the prompt is empty")
    seed = _whole(row, "seed")
    first = config.sample.seed + number if seed is None else seed
    name = str(row.get("name") or f"sample_{number:03d}")
    if not re.fullmatch(r"[^/\0]{1,200}", name) or name.startswith("."):
        raise UserError(f"name {name!r} is no file name")
    return [
        ClipRequest(
            row=number,
            name=name if k == 0 else f"{name}_{k}",
            prompt=prompt,
            negative=str(row.get("negative") or common.negative),
            kind=kind,
            image=image,
            end_image=end_image,
            video=video,
            seed=first + k,
            size=size,
            aspect=aspect,
        )
        for k in range(common.num_samples)
    ]


def check_model(request: ClipRequest, model: ModelConfig) -> None:
    """Refuse given frames for a model that takes none.

    Raises:
        UserError: the weights have no cond_in.
    """
    if request.kind != "t2v" and not model.cond_embed:
        raise UserError(f"{request.kind} needs weights with cond_in, and these have none; leave out --image, --end_image and --video")


def _kind(asked: object, *, image: Path | None, end_image: Path | None, video: Path | None) -> Kind:
    """The kind that was asked for, or the one that the given files mean."""
    found = "v2v_head" if video else "i2v_loop" if image and end_image else "i2v_head" if image else "i2v_tail" if end_image else "t2v"
    if asked is None or asked == "":
        if video and (image or end_image):
            raise UserError("give images or a video, not both")
        return found  # type: ignore[return-value]
    if asked not in KINDS:
        raise UserError(f"kind {asked!r} is not one of {', '.join(KINDS)}")
    kind: Kind = asked  # type: ignore[assignment]
    wanted = {"t2": (), "i2": (image, end_image), "v2": (video,)}[kind[:2]]
    given = tuple(path for path in (image, end_image, video) if path is not None)
    missing = {"i2v_head": image is None, "i2v_tail": end_image is None}.get(kind, kind != "t2v" and not any(wanted))
    if missing:
        what = {"i2v_head": "an image", "i2v_tail": "an end_image", "i2v_loop": "an image, an end_image or both"}.get(kind, "a video")
        raise UserError(f"{kind} needs {what}")
    if len([path for path in wanted if path is not None]) != len(given) or (len(given) == 2 and kind != "i2v_loop"):
        raise UserError(f"{kind} does not take {', '.join(path.name for path in given)}; leave them out or choose another kind")
    return kind


def _size(row: Mapping[str, Any], *, config: RunConfig, common: Common) -> tuple[ClipSize, str | None]:
    """The row's size: by name, in pixels, or the run's; and the name of its aspect ratio."""
    sample, unit = config.sample, config.encoders.spatial_compression * config.model.patch_size
    height, width = _whole(row, "height"), _whole(row, "width")
    resolution, aspect = row.get("resolution") or common.resolution, row.get("aspect") or common.aspect
    if height is None and width is None and (resolution or aspect):
        if not (resolution and aspect):
            raise UserError(f"{resolution or aspect} alone is no size: give a resolution (768px) and an aspect (16:9) together")
        height, width = size_named(str(resolution), str(aspect), multiple=unit)
    elif (height is None) != (width is None):
        raise UserError("give height and width together")
    height, width = height or sample.height, width or sample.width
    frames = _whole(row, "num_frames") or sample.num_frames
    for name, value in (("height", height), ("width", width)):
        if value < unit or value % unit:
            raise UserError(f"{name} {value} is not a multiple of {unit}; use {max(1, round(value / unit)) * unit}")
    ratio, causal = config.encoders.temporal_compression, config.encoders.causal
    if not is_frame_count(frames, compression=ratio, causal=causal):
        rule, nearest = frame_rule(compression=ratio, causal=causal), nearest_frame_count(frames, compression=ratio, causal=causal)
        raise UserError(f"num_frames {frames} is not {rule}; use {nearest}")
    return ClipSize(num_frames=frames, height=height, width=width), None if aspect is None else str(aspect)


def _file(row: Mapping[str, Any], column: str, folder: Path) -> Path | None:
    value = row.get(column)
    if value in (None, ""):
        return None
    path = folder / str(value)
    if not path.is_file():
        raise UserError(f"{column} {path} is missing")
    return path


def _whole(row: Mapping[str, Any], column: str) -> int | None:
    value = row.get(column)
    if value in (None, ""):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.5
    if not math.isfinite(number) or number != int(number) or number < 0:
        raise UserError(f"{column} {value!r} is no whole number")
    return int(number)


def _plain(row: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    """A row with the published names of columns replaced, and `ref` (one or two files, `;` between) taken apart."""
    plain = {PUBLISHED_COLUMNS.get(column, column): value for column, value in row.items() if column != "ref"}
    ref = str(row.get("ref") or "")
    if ref:
        asked = str(plain.get("kind") or kind or "i2v_head")
        first, last = ref.split(";")[0], ref.split(";")[-1]
        by_kind = {"i2v_head": {"image": first}, "i2v_tail": {"end_image": last}, "i2v_loop": {"image": first, "end_image": last}}
        plain.update(by_kind.get(asked, {"video": first}))
    return plain


def _rows(table: Path) -> list[Mapping[str, Any]]:
    import pyarrow as pa
    from pyarrow import csv, parquet

    if not table.is_file():
        raise UserError(f"cannot read {table}: there is no such file")
    try:
        if table.suffix == ".parquet":
            return list(parquet.read_table(table).to_pylist())
        if table.suffix in (".json", ".jsonl"):
            text = table.read_text(encoding="utf-8")
            rows = json.loads(text) if table.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise UserError(f"{table} is no list of objects")
            return rows
        names = csv.open_csv(table, parse_options=csv.ParseOptions(newlines_in_values=True)).schema.names
        as_text = csv.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=True)
        return list(csv.read_csv(table, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=as_text).to_pylist())
    except OSError as error:
        raise UserError(f"cannot read {table}: {error.strerror or error}") from error
    except (pa.ArrowInvalid, ValueError) as error:
        raise UserError(f"{table} is not a readable csv, parquet, json or jsonl table: {str(error).splitlines()[0]}") from error


def _refuse_twins(requests: Sequence[ClipRequest], table: Path) -> None:
    seen: set[str] = set()
    for request in requests:
        if request.name in seen:
            raise UserError(f"{table} names two clips {request.name!r}; give each row its own name")
        seen.add(request.name)

"""Rows and flags become clips, or one line that says what to change."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megasora import recipes
from megasora.config.errors import UserError
from megasora.inference.requests import ClipRequest, Common, read_requests, requests_of

CONFIG = recipes.get("opensora2_stage2")
COMMON = Common(kind=None, negative="", resolution=None, aspect=None, num_samples=1)


def one(row: dict[str, Any], folder: Path, **common: Any) -> ClipRequest:
    (request,) = requests_of(row, number=3, config=CONFIG, common=replace(COMMON, **common), folder=folder)
    return request


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "v.mp4"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({}, "t2v"),
        ({"image": "a.png"}, "i2v_head"),
        ({"end_image": "a.png"}, "i2v_tail"),
        ({"image": "a.png", "end_image": "b.png"}, "i2v_loop"),
        ({"video": "v.mp4"}, "v2v_head"),
        ({"video": "v.mp4", "kind": "v2v_tail_easy"}, "v2v_tail_easy"),
        ({"image": "a.png", "kind": "i2v_loop"}, "i2v_loop"),
    ],
)
def test_files_say_which_frames_are_given(folder: Path, row: dict[str, str], kind: str) -> None:
    request = one({"prompt": "p", **row}, folder)
    assert request.kind == kind
    assert (request.seed, request.name, request.row) == (CONFIG.sample.seed + 3, "sample_003", 3)
    if row.get("kind") == "i2v_loop":  # the published code takes one picture for both ends
        assert request.image == request.end_image == folder / "a.png"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"image": "a.png", "video": "v.mp4"}, "images or a video, not both"),
        ({"kind": "i2v_head"}, "i2v_head needs an image"),
        ({"kind": "v2v_head", "image": "a.png"}, "v2v_head needs a video"),
        ({"kind": "t2v", "image": "a.png"}, "t2v does not take a.png"),
        ({"kind": "i2v_tail", "image": "a.png", "end_image": "b.png"}, "i2v_tail does not take"),
        ({"kind": "i2i"}, "not one of t2v"),
        ({"image": "gone.png"}, "gone.png is missing"),
        ({"aspect": "16:9"}, "alone is no size"),
        ({"height": 100, "width": 256}, "height 100 is not a multiple of 16; use 96"),
        ({"height": 256}, "height and width together"),
        ({"num_frames": 128}, "128 is not 1 or 4k\\+1; use 125"),
        ({"seed": "x"}, "seed 'x' is no whole number"),
        ({"seed": math.inf}, "seed inf is no whole number"),
        ({"num_frames": math.nan}, "num_frames nan is no whole number"),
        ({"name": "../up"}, "no file name"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        one({"prompt": "p", **row}, folder)


def test_sizes_by_name_and_seeds_that_follow(folder: Path) -> None:
    row = {"prompt": "p", "seed": 7, "name": "cat"}
    made = requests_of(
        row, number=0, config=CONFIG, common=replace(COMMON, resolution="768px", aspect="16:9", num_samples=3), folder=folder
    )
    assert [(request.seed, request.name) for request in made] == [(7, "cat"), (8, "cat_1"), (9, "cat_2")]
    assert (made[0].size.height, made[0].size.width, made[0].size.num_frames) == (576, 1024, 129)


def test_tables_of_every_kind_give_the_same_clips(folder: Path) -> None:
    rows = [{"prompt": "a, b", "image": "a.png", "seed": 5}, {"prompt": "c", "image": None, "seed": None}]
    (folder / "t.json").write_text(json.dumps(rows))
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "t.csv").write_text('prompt,image,seed\n"a, b",a.png,5\nc,,\n')
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    tables = [read_requests(folder / f"t.{ending}", config=CONFIG, common=COMMON) for ending in ("json", "jsonl", "csv", "parquet")]
    assert all(table == tables[0] for table in tables)
    made, unusable = tables[0]
    assert [request.kind for request in made] == ["i2v_head", "t2v"] and unusable == []
    assert [request.seed for request in made] == [5, CONFIG.sample.seed + 1]


def test_open_soras_columns_are_understood(folder: Path) -> None:
    (folder / "t.csv").write_text("text,ref,neg\nsea,a.png;b.png,noise\n")
    (request,), _ = read_requests(folder / "t.csv", config=CONFIG, common=replace(COMMON, kind="i2v_loop"))
    assert (request.prompt, request.negative, request.image, request.end_image) == ("sea", "noise", folder / "a.png", folder / "b.png")
    (request,), _ = read_requests(folder / "t.csv", config=CONFIG, common=COMMON)
    assert (request.kind, request.image) == ("i2v_head", folder / "a.png")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,imgae\na,b\n", "unknown column 'imgae': did you mean image"),
        ("image\na.png\n", "no column prompt"),
        ("prompt,name\na,x\nb,x\n", "names two clips 'x'"),
    ],
)
def test_a_bad_table_is_refused(folder: Path, text: str, words: str) -> None:
    (folder / "t.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_requests(folder / "t.csv", config=CONFIG, common=COMMON)
    with pytest.raises(UserError, match="cannot read"):
        read_requests(folder / "none.csv", config=CONFIG, common=COMMON)

"""Rows of a csv manifest with another number of cells than the header: skipped, counted and named, and the others keep their numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megasora.config.errors import UserError
from megasora.data.manifest import SkippedRow, read_manifest

HEADER = "path,text,num_frames,height,width,fps"


def table(tmp_path: Path, *rows: str) -> Path:
    path = tmp_path / "m.csv"
    path.write_text("\n".join((HEADER, *rows)) + "\n")
    return path


@pytest.mark.parametrize(
    ("row", "cells"), [("b.mp4,a dog, running,10,48,64,24", 7), ("b.mp4,10,48,64,24", 5)], ids=["one too many", "one too few"]
)
def test_a_row_with_another_number_of_cells_costs_only_itself(tmp_path: Path, row: str, cells: int) -> None:
    manifest = read_manifest(table(tmp_path, "a.mp4,a cat,10,48,64,24", row, "c.mp4,a cow,10,48,64,24"))
    assert [(clip.row, clip.id, clip.text) for clip in manifest.clips] == [(0, "0", "a cat"), (2, "2", "a cow")]
    reason = f"{cells} cells instead of 6; put cells that contain commas in quotes"
    assert manifest.skipped == (SkippedRow(row=1, reason=reason),)


def test_line_breaks_and_empty_lines_do_not_shift_the_numbers_and_bad_rows_stand_in_order(tmp_path: Path) -> None:
    rows = ('a.mp4,"a\ncat",10,48,64,24', "", "b.mp4,10", "c.mp4,a cow,ten,48,64,24", "d.mp4,10", "e.mp4,a hen,10,48,64,24")
    manifest = read_manifest(table(tmp_path, *rows))
    assert [(clip.row, clip.text) for clip in manifest.clips] == [(0, "a\ncat"), (4, "a hen")]
    assert [(one.row, one.reason.partition(";")[0]) for one in manifest.skipped] == [
        (1, "2 cells instead of 6"),
        (2, "num_frames is not a number: 'ten'"),
        (3, "2 cells instead of 6"),
    ]


def test_numbers_hold_beyond_the_first_block_of_a_large_file(tmp_path: Path) -> None:
    caption = "x" * 2**16  # 40 rows are 2.5 MB, pyarrow reads blocks of 1 MB
    rows = [f"{n}.mp4,{caption},10,48,64,24" + (",extra" if n in (0, 20, 35) else "") for n in range(40)]
    manifest = read_manifest(table(tmp_path, *rows))
    assert [one.row for one in manifest.skipped] == [0, 20, 35]
    assert all(Path(clip.path).stem == str(clip.row) for clip in manifest.clips) and len(manifest.clips) == 37


def test_a_table_of_such_rows_alone_is_refused_with_the_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no usable row \(row 0: 1 cells instead of 6"):
        read_manifest(table(tmp_path, "a.mp4"))


def test_published_columns_are_read_and_others_named(tmp_path: Path) -> None:
    """score_vmafmotion before our vmaf_motion; what pandas writes for nothing is nothing; the rest is named in the table's order."""
    path = tmp_path / "m.csv"
    path.write_text(
        "path,text,num_frames,height,width,aspect_ratio,resolution,fps,score_aes,score_vmafmotion,vmaf_motion,media\n"
        "a.mp4,x,50,64,64,1,4096,24.0,5.1,3.5,9,video\n"
        "b.mp4,x,50,64,64,1,4096,24.0,5.1,nan,9,video\n"
        "c.png,x,1,64,64,1,4096,nan,5.1,,,image\n"
    )
    manifest = read_manifest(path)
    assert [clip.motion_score for clip in manifest.clips] == [3.5, 9.0, None]
    assert [math.isnan(clip.fps) for clip in manifest.clips] == [False, False, True]
    assert manifest.unread == ("score_aes", "media")

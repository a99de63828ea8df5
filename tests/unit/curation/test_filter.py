"""Rules, stages, near-duplicates and the report, on a made table whose every row is known."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import zlib
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from megasora.cli import main
from megasora.config.errors import UserError
from megasora.curation.columns import SCORES, SHOTS
from megasora.curation.duplicates import duplicate_of
from megasora.curation.planted import scene, write_clip
from megasora.curation.report import run_report
from megasora.curation.rules import STAGES, FilterRules, active_rules, without
from megasora.curation.selection import record_file, removed_table, run_filter
from megasora.curation.settings import FilterSettings, ReportSettings
from megasora.curation.tables import METADATA_KEY
from megasora.data.manifest import read_manifest

SCHEMA = pa.schema([*SHOTS, *(field for field in SCORES if field.name != "aesthetic")])


def digest(number: int) -> bytes:
    """A hash far from all others, half of its bits set as PDQ's are."""
    generator = np.random.default_rng(number)
    bits = np.zeros(256, np.uint8)
    bits[generator.permutation(256)[:128]] = 1
    return np.packbits(bits).tobytes()


def row(name: str, **changes: Any) -> dict[str, Any]:
    """A clip that passes every stage."""
    number = zlib.crc32(name.encode())
    good = {
        "id": name, "path": f"/clips/{name}.mp4", "text": "a caption", "media": "video", "codec": "h264", "profile": "High",
        "pix_fmt": "yuv420p", "file_bytes": 10**6, "duration_s": 4.0, "num_frames": 96, "height": 720, "width": 1280, "rotation": 0,
        "sample_aspect_ratio": 1.0,
        "aspect_ratio": 0.5625, "resolution": 720 * 1280, "fps": 24.0, "bits_per_pixel": 0.1, "variable_fps": False, "error": "",
        "source_id": name, "start_frame": 0, "end_frame": 96, "crop_x": None, "crop_y": None, "crop_w": None, "crop_h": None,
        "vmaf_motion": 4.0, "blur_laplacian": 200.0, "blur_ffmpeg": 5.0, "brightness": 0.5, "dark_share": 0.05, "bright_share": 0.02,
        "jitter": 4.0, "freeze_share": 0.0, "black_share": 0.0, "text_area": 0.0, "frame_hashes": [digest(number + k) for k in range(5)],
        "score_error": "",
    }  # fmt: skip
    return {**good, **changes}


def table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def judged(tmp_path: Path, rows: list[dict[str, Any]], rules: FilterRules = STAGES["256px"]) -> dict[str, str | None]:
    """id -> the rule it was put down to."""
    output = tmp_path / "manifest.parquet"
    run_filter(table(tmp_path / "in.parquet", [row("always kept"), *rows]), FilterSettings(output=output, overwrite=True), rules)
    gone = {r["id"]: r["removed_by"] for r in parquet.read_table(removed_table(output)).to_pylist()}
    return {r["id"]: gone.get(r["id"]) for r in rows}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({}, None),
        ({"error": "truncated", "fps": None, "vmaf_motion": None}, "broken"),
        ({"rotation": 90}, "upright"),
        ({"sample_aspect_ratio": 12 / 11}, "square_pixels"),
        ({"sample_aspect_ratio": 0.98}, "square_pixels"),
        ({"sample_aspect_ratio": 1.009}, None),
        ({"sample_aspect_ratio": 0.991}, None),
        ({"profile": "Constrained Baseline"}, "banned_profiles"),
        ({"profile": None}, None),
        ({"duration_s": 1.99}, "min_duration_s"),
        ({"duration_s": 2.0}, None),
        ({"fps": 15.9}, "min_fps"),
        ({"bits_per_pixel": 0.0199}, "min_bits_per_pixel"),
        ({"aspect_ratio": 3.01}, "max_aspect"),
        ({"aspect_ratio": 0.33}, "max_aspect"),
        ({"aspect_ratio": 3.0}, None),
        ({"resolution": 159 * 283, "aspect_ratio": 159 / 283}, "min_side_px"),
        ({"resolution": 160 * 284, "aspect_ratio": 160 / 284}, None),
        ({"score_error": "frame 3 is corrupt", "vmaf_motion": None}, "unscored"),
        ({"black_share": 0.2}, "max_black_share"),
        ({"dark_share": 0.95}, "max_dark_share"),
        ({"bright_share": 0.6}, "max_bright_share"),
        ({"freeze_share": 0.6}, "max_freeze_share"),
        ({"blur_laplacian": 14.0}, "min_blur_laplacian"),
        ({"blur_laplacian": float("nan")}, "min_blur_laplacian"),
        ({"vmaf_motion": 0.1}, "min_vmaf_motion"),
        ({"vmaf_motion": 41.0}, "max_vmaf_motion"),
        ({"vmaf_motion": None}, "min_vmaf_motion"),
        ({"jitter": 31.0}, "max_jitter"),
        ({"text_area": 0.11}, "max_text_area"),
        ({"text_area": None}, "max_text_area"),
        # an image has no time, and no rule on time holds against it
        ({"media": "image", "duration_s": 0.0, "fps": 1.0, **dict.fromkeys(("vmaf_motion", "jitter", "freeze_share"))}, None),
    ],
)  # fmt: skip
def test_each_rule_removes_what_it_says_and_no_more(tmp_path: Path, changes: dict[str, Any], rule: str | None) -> None:
    assert judged(tmp_path, [row("it", **changes)]) == {"it": rule}


def test_every_setting_is_a_rule_that_can_be_turned_off() -> None:
    everything = FilterRules(even_fps=True, captioned=True, max_duration_s=9.0, min_aesthetic=5.0, where="fps > 1")
    names = {rule.name for rule in active_rules(everything)} | {"duplicate_bits"}
    assert names == {field.name for field in fields(FilterRules)} | {"broken", "unscored"}
    off = everything
    for field in fields(FilterRules):
        off = without(off, field.name)
    assert [rule.name for rule in active_rules(off)] == ["broken", "unscored"]
    assert off.duplicate_bits is None


@given(st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_each_stage_keeps_a_part_of_the_one_before(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(60):
        side, aspect = int(generator.integers(100, 1200)), float(generator.uniform(0.25, 4))
        rows.append(
            row(
                f"{seed}-{number}",
                vmaf_motion=float(generator.exponential(15)),
                blur_laplacian=float(generator.exponential(100)),
                jitter=float(generator.exponential(10)),
                text_area=float(generator.exponential(0.03)),
                dark_share=float(generator.uniform(0, 1)),
                bright_share=float(generator.uniform(0, 0.6)),
                aspect_ratio=aspect,
                resolution=int(side * side * max(aspect, 1 / aspect)),
            )
        )
    tmp_path = tmp_path_factory.mktemp("stages")
    removed = {stage: {name for name, rule in judged(tmp_path, rows, rules).items() if rule} for stage, rules in STAGES.items()}
    assert removed["256px"] <= removed["256px_i2v"] <= removed["768px"]
    assert len(removed["768px"]) > len(removed["256px"])


def test_the_manifest_is_in_input_order_and_the_record_tells_all(tmp_path: Path) -> None:
    rows = [row(f"c{n}", fps=12.0 if n % 3 == 0 else 24.0, text="" if n == 1 else "x") for n in range(30)]
    source = table(tmp_path / "in.parquet", rows)
    output = tmp_path / "m.parquet"
    result = run_filter(source, FilterSettings(output=output), STAGES["256px"])
    assert (result.clips, result.kept, result.without_caption) == (30, 20, 1)
    assert [clip.id for clip in read_manifest(output).clips] == [f"c{n}" for n in range(30) if n % 3]
    record = json.loads(record_file(output).read_text())
    counts = {rule["name"]: (rule["removed"], rule["fails"]) for rule in record["result"]["rules"]}
    assert counts.pop("min_fps") == (10, 10) and set(counts.values()) == {(0, 0)}
    assert record["rules"]["min_fps"] == 16.0 and "fps < 16.0" in record["sql"] and len(record["input"]["sha256"]) == 64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.parquet", "m.filter.json", "m.parquet", "m.removed.parquet"]
    with pytest.raises(UserError, match="exists; give --overwrite"):
        run_filter(source, FilterSettings(output=output), STAGES["256px"])


def test_captions_of_another_table_replace_the_text(tmp_path: Path) -> None:
    source = table(tmp_path / "in.parquet", [row("a"), row("b", text="old")])
    (tmp_path / "c.csv").write_text('id,text\na,"a fox, running"\nnobody,lost\n')
    result = run_filter(source, FilterSettings(output=tmp_path / "m.parquet", captions=tmp_path / "c.csv"), STAGES["256px"])
    assert [clip.text for clip in read_manifest(tmp_path / "m.parquet").clips] == ["a fox, running", "old"]
    assert result.unknown_captions == 1
    (tmp_path / "d.csv").write_text("id,words\na,b\n")
    with pytest.raises(UserError, match="must have the columns text and id"):
        run_filter(source, FilterSettings(output=tmp_path / "n.parquet", captions=tmp_path / "d.csv"), STAGES["256px"])


def test_a_score_that_was_not_taken_is_refused_with_the_cure(tmp_path: Path) -> None:
    schema = pa.schema([field for field in SCHEMA if field.name != "text_area"])
    source = table(tmp_path / "in.parquet", [row("a")], schema)
    with pytest.raises(
        UserError, match="rule max_text_area needs the column text_area.*score --scores text makes it, --max_text_area None"
    ):
        run_filter(source, FilterSettings(output=tmp_path / "m.parquet"), STAGES["256px"])
    run_filter(source, FilterSettings(output=tmp_path / "m.parquet"), without(STAGES["256px"], "max_text_area"))


@pytest.mark.parametrize("note", [None, {"trained": False, "source": "random"}, {"trained": True, "source": "LAION"}])
def test_aesthetic_scores_count_only_from_weights_said_to_be_trained(tmp_path: Path, note: dict[str, Any] | None) -> None:
    said = {METADATA_KEY: json.dumps({"settings": {"aesthetic": note}}).encode()}
    schema = pa.schema([*SCHEMA, SCORES.field("aesthetic")], metadata=said)
    source = table(tmp_path / "aesthetic.parquet", [row("a", aesthetic=9.0)], schema)
    refuses = contextlib.nullcontext() if note and note["trained"] else pytest.raises(UserError, match="not said to be trained")
    with refuses:
        run_filter(source, FilterSettings(output=tmp_path / "n.parquet"), replace(STAGES["256px"], min_aesthetic=5.0))


def test_a_condition_in_sql_is_one_more_rule_and_a_wrong_one_is_one_line(tmp_path: Path) -> None:
    rules = replace(STAGES["256px"], where="height >= 480 AND codec <> 'vp9'")
    assert judged(tmp_path, [row("a"), row("b", codec="vp9"), row("c", codec=None)], rules) == {"a": None, "b": "where", "c": "where"}
    with pytest.raises(UserError, match="--where 'hight > 3': .*hight"):
        judged(tmp_path, [row("a")], replace(STAGES["256px"], where="hight > 3"))


def test_a_filter_that_keeps_nothing_writes_nothing(tmp_path: Path) -> None:
    source = table(tmp_path / "in.parquet", [row("a", fps=5.0), row("b", fps=6.0)])
    with pytest.raises(UserError, match=r"no clip of 2 passes; min_fps alone removes 2 \(fewer than 16 frames a second\)"):
        run_filter(source, FilterSettings(output=tmp_path / "m.parquet"), STAGES["256px"])
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_the_best_copy_stays_also_when_a_worse_one_fails_another_rule(tmp_path: Path) -> None:
    hashes = [digest(k) for k in range(5)]
    rows = [
        row("low", frame_hashes=hashes, bits_per_pixel=0.05),
        row("high", frame_hashes=hashes, bits_per_pixel=0.2),
        row("largest but shaken", frame_hashes=hashes, resolution=4 * 720 * 1280, jitter=90.0),
        row("other"),
    ]
    assert judged(tmp_path, rows) == {"low": "duplicate_bits", "high": None, "largest but shaken": "max_jitter", "other": None}
    removed = parquet.read_table(removed_table(tmp_path / "manifest.parquet")).to_pylist()
    assert {r["id"]: r["duplicate_of"] for r in removed} == {"low": "high", "largest but shaken": None}


def brute_force(frames: list[list[np.ndarray]], rank: np.ndarray, bits: int) -> list[int]:
    """The definition, pair by pair."""
    label = list(range(len(frames)))

    def find(n: int) -> int:
        while label[n] != n:
            n = label[n]
        return n

    for a in range(len(frames)):
        for b in range(a + 1, len(frames)):
            small, large = (frames[a], frames[b]) if len(frames[a]) <= len(frames[b]) else (frames[b], frames[a])
            near = sum(any(int((x != y).sum()) <= bits for y in large) for x in small)
            if small and 2 * near > len(small):
                label[max(find(a), find(b))] = min(find(a), find(b))
    best: dict[int, int] = {}
    for n in range(len(frames)):
        root = find(n)
        if root not in best or rank[n] > rank[best[root]]:
            best[root] = n
    return [best[find(n)] for n in range(len(frames))]


@given(st.integers(0, 2**32), st.integers(1, 14), st.integers(4, 60))
@settings(max_examples=150, deadline=None)
def test_near_duplicates_are_those_of_the_definition(seed: int, count: int, noise: int) -> None:
    generator = np.random.default_rng(seed)
    base = [np.isin(np.arange(256), generator.permutation(256)[:128]).astype(np.uint8) for _ in range(4)]
    frames: list[list[np.ndarray]] = []
    for _ in range(count):
        clip = []
        for _ in range(int(generator.integers(0, 5))):
            bits = base[int(generator.integers(4))].copy()
            bits[generator.integers(0, 256, int(generator.integers(0, noise)))] ^= 1
            clip.append(bits)
        frames.append(clip)
    rank = generator.permutation(count).astype(float)
    flat = np.array([np.packbits(bits) for clip in frames for bits in clip], np.uint8).reshape(-1, 32)
    lengths = np.array([len(clip) for clip in frames], np.int64)
    assert duplicate_of(flat, lengths, rank, bits=31, exact=True).tolist() == brute_force(frames, rank, 31)


def test_the_fast_index_finds_near_copies_too() -> None:
    generator = np.random.default_rng(0)
    originals = np.packbits(np.argsort(generator.random((3000, 256)), axis=1) < 128, axis=1)
    copies = np.unpackbits(originals[:500], axis=1)
    for bits in copies:
        bits[generator.permutation(256)[:6]] ^= 1
    hashes = np.concatenate([originals, np.packbits(copies, axis=1)])
    stays = duplicate_of(hashes, np.ones(3500, np.int64), -np.arange(3500.0), bits=31, exact=False)
    assert (stays[:3000] == np.arange(3000)).all()
    assert (stays[3000:] == np.arange(500)).mean() > 0.99


def test_flat_pictures_and_title_cards_do_not_glue_clips_together() -> None:
    flat, card = np.zeros(32, np.uint8), np.frombuffer(digest(7), np.uint8)
    own = [np.frombuffer(digest(100 + n), np.uint8) for n in range(200)]
    black = np.stack([frame for n in range(200) for frame in (flat, flat, own[n])])
    assert (duplicate_of(black, np.full(200, 3), np.arange(200.0), bits=31) == np.arange(200)).all()
    titled = np.stack([frame for n in range(200) for frame in (card, card, own[n])])
    assert (duplicate_of(titled, np.full(200, 3), np.arange(200.0), bits=31) == np.arange(200)).all()


def test_the_report_is_one_file_that_counts_shows_and_escapes(tmp_path: Path) -> None:
    clip = tmp_path / "a <b>&.mp4"
    write_clip(clip, scene(0, count=12, height=64, width=96))
    real = {"path": str(clip), "num_frames": 12, "start_frame": 0, "end_frame": 12, "height": 64, "width": 96}
    rows = [row(f"good{n}", **real) for n in range(4)]
    rows += [row("slow", **real, fps=9.5), row("gone", error="<script>alert(1)</script>", num_frames=None)]
    output = tmp_path / "m.parquet"
    run_filter(table(tmp_path / "in.parquet", rows), FilterSettings(output=output), STAGES["256px"])
    page = run_report(output, ReportSettings(output=tmp_path / "r.html")).read_text()
    assert page.count("data:image/jpeg;base64,") == 5 and "a &lt;b&gt;&amp;.mp4" in page
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "@import" not in page  # nothing comes from elsewhere
    assert "fewer than 16 frames a second" in page and ">9.5<" in page
    with pytest.raises(UserError, match="has no record"):
        run_report(tmp_path / "in.parquet", ReportSettings(output=tmp_path / "x.html"))


def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    monkeypatch.delitem(sys.modules, "megasora.curation.selection")
    with pytest.raises(SystemExit):
        main(["data", "filter", "x.parquet", "--output", "y.parquet"])
    assert 'data filter needs the package of duckdb: pip install "megasora[data]"' in capsys.readouterr().err


def test_the_command_takes_a_stage_and_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = table(tmp_path / "in.parquet", [row("a"), row("b", text_area=0.04), row("c", fps=18.0)])
    arguments = ["data", "filter", str(source), "--output", str(tmp_path / "m.parquet"), "--stage", "768px", "--min_fps", "20", "--json"]
    main([*arguments, "--duplicate_bits", "None"])
    result = json.loads(capsys.readouterr().out)
    assert result["kept"] == 1
    assert Counter({r["name"]: r["removed"] for r in result["rules"] if r["removed"]}) == {"min_fps": 1, "max_text_area": 1}
    with pytest.raises(SystemExit):
        main([*arguments[:5], "--stage", "512px"])
    assert "invalid choice '512px' for argument '--stage'. Expected one of ('256px', '256px_i2v', '768px')" in capsys.readouterr().err


def test_frames_match_up_to_the_distance_and_most_must() -> None:
    bits = np.isin(np.arange(256), np.arange(128)).astype(np.uint8)

    def flipped(count: int) -> np.ndarray:
        return np.packbits(np.r_[1 - bits[:count], bits[count:]])

    def stays(*clips: list[np.ndarray]) -> list[int]:
        lengths = np.array([len(clip) for clip in clips])
        return duplicate_of(
            np.stack([frame for clip in clips for frame in clip]), lengths, -np.arange(len(clips), dtype=float), bits=31
        ).tolist()

    assert stays([flipped(0)], [flipped(31)]) == [0, 0]
    assert stays([flipped(0)], [flipped(32)]) == [0, 1]
    other = np.frombuffer(digest(3), np.uint8)
    far = np.frombuffer(digest(4), np.uint8)
    assert stays([flipped(0), other], [flipped(0), far]) == [0, 1]  # one of two is not most
    assert stays([flipped(0), other], [flipped(0), flipped(1), far]) == [0, 1]  # one frame with two matches counts once


def test_of_equal_pictures_the_larger_then_the_richer_stays(tmp_path: Path) -> None:
    hashes = [digest(k) for k in range(5)]
    rows = [
        row("rich but small", frame_hashes=hashes, resolution=360 * 640, bits_per_pixel=0.9),
        row("large", frame_hashes=hashes, resolution=720 * 1280, bits_per_pixel=0.1),
        row("large and rich", frame_hashes=hashes, resolution=720 * 1280, bits_per_pixel=0.2),
    ]
    gone = {"rich but small": "duplicate_bits", "large": "duplicate_bits", "large and rich": None}
    assert judged(tmp_path, rows) == gone

"""Probe, shots and score on clips with planted facts; what libavfilter and OpenCV say is the truth for the scores."""

from __future__ import annotations

import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from pyarrow import parquet
from scenedetect import FrameTimecode
from scenedetect.detectors import ContentDetector
from scenedetect.stats_manager import StatsManager

from megasora.config.errors import UserError
from megasora.curation.columns import SCORES, SHOTS
from megasora.curation.frames import FilterGraph, SmallFrames, Span, read_frames
from megasora.curation.planted import Pictures, make_planted, scene, write_clip
from megasora.curation.pool import Row
from megasora.curation.probe import probe_row, run_probe
from megasora.curation.score import run_score, score_row
from megasora.curation.settings import Limits, ProbeSettings, ScoreSettings, ShotsSettings
from megasora.curation.shots import cut_row, run_shots
from megasora.data.manifest import read_manifest

NAMES = ("good.mp4", "good_vp9.webm", "cut_tail.mp4", "cut_data.mp4", "cut.webm", "flipped.mp4", "empty.mp4", "noise.mp4", "text.mp4")
NAMES += ("sound.mp4", "letterbox.mp4", "two_scenes.mp4", "titles.mp4", "black.mp4", "still.mp4", "baseline.mp4", "long.mp4", "blurred.mp4")


@pytest.fixture(scope="module")
def pictures() -> tuple[Pictures, Pictures]:
    return scene(0), scene(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pictures: tuple[Pictures, Pictures]) -> Path:
    made = tmp_path_factory.mktemp("planted")
    make_planted(made, first=pictures[0], second=pictures[1], only=NAMES)
    (made / "good.txt").write_text("A landscape of noise\n")
    return made


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(scope="module")
def tables(folder: Path, out: Path) -> dict[str, list[Row]]:
    """Rows of every stage over the planted clips."""
    limits = Limits(workers=2, timeout_s=60)
    run_probe(folder, ProbeSettings(output=out / "probe.parquet"), limits=limits)
    run_shots(out / "probe.parquet", ShotsSettings(output=out / "shots.parquet"), limits=limits)
    run_score(out / "shots.parquet", ScoreSettings(output=out / "score.parquet"), limits=limits)
    return {name: parquet.read_table(out / f"{name}.parquet").to_pylist() for name in ("probe", "shots", "score")}


def named(rows: list[Row], name: str) -> list[Row]:
    return [row for row in rows if Path(row["path"]).name == name]


def row_of(path: Path) -> Row:
    (row,) = probe_row({"id": path.stem, "path": str(path), "text": ""}, sidecar=False)
    return row


def test_probe_gives_the_facts_of_a_good_file(tables: dict[str, list[Row]]) -> None:
    (row,) = named(tables["probe"], "good.mp4")
    assert (row["codec"], row["num_frames"], row["height"], row["width"], row["fps"]) == ("h264", 75, 288, 512, 25.0)
    assert row["duration_s"] == 3.0 and row["aspect_ratio"] == 288 / 512 and not row["variable_fps"] and row["rotation"] == 0
    assert row["text"] == "A landscape of noise" and row["error"] == ""
    # the container's few kilobytes are no picture: bits per pixel count the stream only
    assert 0.9 * row["file_bytes"] < row["bits_per_pixel"] * 75 * 288 * 512 / 8 < row["file_bytes"]


def test_probe_names_the_codec_profile(tables: dict[str, list[Row]]) -> None:
    assert named(tables["probe"], "baseline.mp4")[0]["profile"] == "Constrained Baseline"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.mp4", "the file is empty"),
        ("noise.mp4", "Invalid data"),
        ("text.mp4", "Invalid data"),
        ("cut_tail.mp4", "Invalid data"),
        ("cut_data.mp4", "corrupt|truncated"),
        ("cut.webm", "truncated"),
        ("sound.mp4", "no video stream"),
    ],
)
def test_probe_says_why_a_file_is_broken(tables: dict[str, list[Row]], name: str, reason: str) -> None:
    (row,) = named(tables["probe"], name)
    assert re.search(reason, row["error"]), row["error"]


def test_damage_inside_the_data_is_found_when_it_is_decoded(tables: dict[str, list[Row]]) -> None:
    rows = named(tables["score"], "flipped.mp4")
    assert rows and any(row["error"] or row["score_error"] for row in rows)


def test_every_row_of_probe_reaches_the_last_table(tables: dict[str, list[Row]]) -> None:
    probed = {row["path"] for row in tables["probe"]}
    assert {row["path"] for row in tables["shots"]} == probed == {row["path"] for row in tables["score"]}
    ids = [row["id"] for row in tables["score"]]
    assert len(set(ids)) == len(ids)
    assert set(SHOTS.names) <= set(tables["score"][0]) and set(SCORES.names) - {"aesthetic"} <= set(tables["score"][0])


def test_a_cut_is_found_to_the_frame(tables: dict[str, list[Row]]) -> None:
    spans = [(row["start_frame"], row["end_frame"]) for row in named(tables["shots"], "two_scenes.mp4")]
    assert spans == [(0, 60), (60, 120)]


@pytest.mark.parametrize(("detector", "threshold"), [("content", None), ("scdet", 5.0)])
def test_the_other_detectors_find_it_too(folder: Path, tmp_path: Path, detector: str, threshold: float | None) -> None:
    settings = ShotsSettings(output=tmp_path / "x.parquet", detector=detector, threshold=threshold)  # type: ignore[arg-type]
    rows = cut_row(row_of(folder / "two_scenes.mp4"), settings=settings)
    assert [row["start_frame"] for row in rows] == [0, 60]


def test_shots_longer_than_8_seconds_are_cut_into_8_and_a_rest(tables: dict[str, list[Row]]) -> None:
    rows = named(tables["shots"], "long.mp4")
    assert [(row["start_frame"], row["end_frame"], row["duration_s"]) for row in rows] == [(0, 200, 8.0), (200, 300, 4.0)]


def test_black_bars_are_cropped_and_a_black_clip_is_not(tables: dict[str, list[Row]]) -> None:
    (boxed,) = named(tables["shots"], "letterbox.mp4")
    assert tuple(boxed[f"crop_{part}"] for part in "xywh") == (0, 40, 512, 208)
    assert boxed["aspect_ratio"] == 208 / 512
    assert named(tables["shots"], "black.mp4")[0]["crop_w"] is None
    assert named(tables["shots"], "good.mp4")[0]["crop_w"] is None


def test_reencoded_shots_are_upright_cropped_slower_and_smaller(tmp_path: Path, pictures: tuple[Pictures, Pictures]) -> None:
    boxed = [picture.copy() for picture in pictures[0]]
    for picture in boxed:
        picture[:, :64] = picture[:, -64:] = 0
    path = tmp_path / "fast.mp4"
    write_clip(path, boxed, fps=50)
    settings = ShotsSettings(output=tmp_path / "x.parquet", clips=tmp_path / "clips", max_long_side=192, min_seconds=1.0)
    (tmp_path / "clips").mkdir()
    (shot,) = cut_row(row_of(path), settings=settings)
    again = row_of(Path(shot["path"]))
    assert (again["num_frames"], again["fps"]) == (38, 25.0) == (shot["num_frames"], shot["fps"])
    assert (again["height"], again["width"]) == (144, 192) == (shot["height"], shot["width"])
    assert shot["crop_w"] is None and shot["start_frame"] == 0 and shot["end_frame"] == 38
    assert shot["bits_per_pixel"] == row_of(path)["bits_per_pixel"]  # the source's quality, not the new file's


def test_a_range_that_starts_late_reads_the_frames_of_a_count_from_the_beginning(folder: Path) -> None:
    path = str(folder / "long.mp4")
    counted = [
        frame.to_ndarray(format="gray").tobytes() for number, frame in read_frames(Span(path=path, start=0, end=260)) if number >= 200
    ]
    sought = [frame.to_ndarray(format="gray").tobytes() for _, frame in read_frames(Span(path=path, start=200, end=260))]
    assert len(sought) == 60 and sought == counted


def test_uneven_time_stamps_are_noticed(tmp_path: Path, pictures: tuple[Pictures, Pictures]) -> None:
    path = tmp_path / "uneven.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.time_base = 512, 288, "yuv420p", Fraction(1, 1000)
        for number, picture in enumerate(pictures[0][:30]):
            frame = av.VideoFrame.from_ndarray(picture, format="bgr24")
            frame.pts, frame.time_base = 40 * number + (300 if number > 10 else 0), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert row_of(path)["variable_fps"]


def test_scores_tell_planted_defects_from_good_clips(tables: dict[str, list[Row]]) -> None:
    good, black, still, titles, blurred = (
        named(tables["score"], name)[0] for name in ("good.mp4", "black.mp4", "still.mp4", "titles.mp4", "blurred.mp4")
    )
    assert good["freeze_share"] == 0 and good["text_area"] == 0 and good["black_share"] == 0 and good["vmaf_motion"] > 1
    assert black["black_share"] == 1 and black["dark_share"] == 1 and black["blur_ffmpeg"] is None  # flat frames have no edge to measure
    assert still["freeze_share"] == 1 and still["vmaf_motion"] < 0.01
    assert titles["text_area"] > 0.1
    assert blurred["blur_laplacian"] < 0.2 * good["blur_laplacian"] and blurred["blur_ffmpeg"] > 2 * good["blur_ffmpeg"]
    assert len(good["frame_hashes"]) == 5 and all(len(digest) == 32 for digest in good["frame_hashes"])


def test_laplacian_blur_is_opencvs(folder: Path, tables: dict[str, list[Row]]) -> None:
    frames = [frame.to_ndarray(format="bgr24") for _, frame in read_frames(Span(path=str(folder / "good.mp4"), start=0, end=75))]
    values = [cv2.Laplacian(cv2.cvtColor(frames[n], cv2.COLOR_BGR2GRAY), cv2.CV_64F).var() for n in (7, 22, 37, 52, 67)]
    assert named(tables["score"], "good.mp4")[0]["blur_laplacian"] == float(np.median(values))


def test_jitter_is_pyscenedetects_content_value(folder: Path, tables: dict[str, list[Row]]) -> None:
    detector, stats = ContentDetector(), StatsManager(base_timecode=FrameTimecode(0, fps=25.0))
    detector.stats_manager = stats
    small = SmallFrames(long_side=256, crop=None)
    for number, frame in read_frames(Span(path=str(folder / "good.mp4"), start=0, end=75)):
        detector.process_frame(FrameTimecode(number, fps=25.0), small(frame))
    values = [stats.get_metrics(FrameTimecode(n, fps=25.0), ["content_val"])[0] for n in range(1, 75)]
    assert named(tables["score"], "good.mp4")[0]["jitter"] == pytest.approx(np.mean(values), rel=1e-12)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg command")
@pytest.mark.parametrize(
    ("chain", "key"), [("vmafmotion", "lavfi.vmafmotion.score"), ("blurdetect", "lavfi.blur"), ("scdet=threshold=10", "lavfi.scd.score")]
)
def test_filters_agree_with_the_ffmpeg_command(folder: Path, chain: str, key: str) -> None:
    path = folder / "two_scenes.mp4"
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-vf", f"{chain},metadata=print:file=-", "-f", "null", "-"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    theirs = [float(line.partition("=")[2]) for line in said.splitlines() if line.startswith(key + "=")]
    name, _, arguments = chain.partition("=")
    graph: FilterGraph | None = None
    ours = []
    for _, frame in read_frames(Span(path=str(path), start=0, end=120)):
        graph = graph or FilterGraph(frame, [(name, arguments)])
        ours.append(float(graph.metadata(frame)[key]))
    assert len(ours) == 120 == len(theirs)
    # both print a few digits: vmafmotion two, the others six
    assert np.abs(np.array(ours) - np.array(theirs)).max() <= (0.011 if name == "vmafmotion" else 1e-3 * max(theirs))


def test_a_scored_table_is_a_manifest(tables: dict[str, list[Row]], tmp_path: Path) -> None:
    import pyarrow as pa

    good = [row for row in tables["score"] if not row["error"] and not row["score_error"]]
    parquet.write_table(pa.Table.from_pylist(good), tmp_path / "m.parquet")
    clips = {clip.id: clip for clip in read_manifest(tmp_path / "m.parquet").clips}
    second = named(tables["score"], "two_scenes.mp4")[1]
    assert (clips[second["id"]].start_frame, clips[second["id"]].num_frames) == (60, 60)
    boxed = named(tables["score"], "letterbox.mp4")[0]
    assert clips[boxed["id"]].crop == (0, 40, 512, 208) and clips[boxed["id"]].motion_score == boxed["vmaf_motion"]


def test_a_captioner_is_asked_for_clips_without_text(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_captions.py").write_text("def describe(frames, row):\n    return f'{len(frames)} frames of {frames.shape[1:]}'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = ScoreSettings(output=tmp_path / "x.parquet", scores=(), captioner="my_captions:describe", captioner_frames=3)
    row = row_of(folder / "good.mp4")
    assert score_row(row, settings=settings)[0]["text"] == "3 frames of (288, 512, 3)"
    assert score_row({**row, "text": "has one"}, settings=settings)[0]["text"] == "has one"


@pytest.mark.slow
def test_scores_from_a_ray_cluster_are_the_same(tables: dict[str, list[Row]], out: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run_score(out / "shots.parquet", ScoreSettings(output=tmp_path / "ray.parquet"), limits=Limits(workers=2, timeout_s=60, ray="local"))
    assert parquet.read_table(tmp_path / "ray.parquet").equals(parquet.read_table(out / "score.parquet"))


def test_scores_that_cannot_work_are_refused_before_any_clip(tables: dict[str, list[Row]], tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    for settings, words in (
        (ScoreSettings(output=out, scores=("aesthetic",)), "go together"),
        (ScoreSettings(output=out, captioner="nothing"), "must be module:function"),
        (ScoreSettings(output=out, scores=()), "--scores is empty"),
    ):
        with pytest.raises(UserError, match=words):
            run_score(tmp_path / "none.parquet", settings, limits=Limits())
    with pytest.raises(UserError, match="does not exist"):
        run_score(tmp_path / "none.parquet", ScoreSettings(output=out), limits=Limits())

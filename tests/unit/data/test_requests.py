"""From a row of the manifest to the shape a clip trains at and the frames that are decoded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megasora.config.schema import DataConfig, EncodersConfig
from megasora.data.buckets import choose_frames, choose_size, stride_to
from megasora.data.decoding.contract import DecodeRequest
from megasora.data.manifest import Clip, read_manifest
from megasora.data.plan import classes_of, plan_clip, request_of

CLIP = Clip(id="a", path="a.mp4", text="", num_frames=98, height=720, width=1280, fps=60.0, start_frame=7, crop=(4, 0, 720, 720))


def test_a_request_has_the_start_stride_and_crop_of_its_clip() -> None:
    # 60 fps at most 24: every third frame, so 98 frames give 33; the square inside the crop trains at 256 x 256
    planned = plan_clip(CLIP, data=DataConfig(), encoders=EncodersConfig(), patch_size=2)
    assert request_of(planned) == DecodeRequest(
        path="a.mp4", start=7, stride=3, num_frames=33, height=256, width=256, crop=(4, 0, 720, 720)
    )
    assert planned.grid == (9, 16, 16)
    assert (planned.fps, planned.named_fps) == (20.0, 20)
    assert planned.num_starts == 2  # 33 frames at stride 3 are 97 of the 98
    assert request_of(planned, offset=1).start == 8
    with pytest.raises(ValueError, match="fill none"):
        plan_clip(replace(CLIP, num_frames=96), data=DataConfig(frame_counts=(33,)), encoders=EncodersConfig(), patch_size=2)


def test_classes_count_the_pixels_inside_the_crop() -> None:
    data = DataConfig(resolution_mix=(("768px", 1.0), ("256px", 1.0)))
    clip = replace(CLIP, height=1080, width=1920)
    assert classes_of(replace(clip, crop=None), data) == ("256px", "768px")
    assert classes_of(replace(clip, crop=(0, 0, 300, 300)), data) == ("256px",)


def test_the_nearest_aspect_is_nearest_in_ratio() -> None:
    # 2.29 lies between 368/176 = 2.091 and 400/160 = 2.5: 2.5 / 2.29 = 1.092 is less than 2.29 / 2.091 = 1.095
    assert choose_size(500, 1145, resolution="256px", multiple=16) == (160, 400)
    assert choose_size(1145, 500, resolution="256px", multiple=16) == (400, 160)


def test_an_exact_frame_count_fits_and_rounding_does_not_double_a_stride() -> None:
    assert [choose_frames(frames, frame_counts=(97, 33, 1)) for frames in (98, 97, 96, 33, 32, 0)] == [97, 97, 33, 33, 1, 0]
    assert stride_to(24.00001, target_fps=24.0) == 1
    assert stride_to(48.00001, target_fps=24.0) == 2


def test_a_row_may_name_a_range_of_its_file(tmp_path: Path) -> None:
    header = "path,text,num_frames,height,width,fps,start_frame,end_frame\n"
    (tmp_path / "m.csv").write_text(header + "a.mp4,x,50,64,64,24,10,20\nb.mp4,x,5,64,64,24,10,20\nc.mp4,x,50,64,64,24,,\n")
    assert [(clip.start_frame, clip.num_frames) for clip in read_manifest(tmp_path / "m.csv").clips] == [(10, 10), (10, 5), (0, 50)]

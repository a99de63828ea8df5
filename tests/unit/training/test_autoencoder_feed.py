"""Frames of a clip some strides apart: evenly among what its length allows, by hand."""

from __future__ import annotations

import pytest

from megasora.config.schema import DataConfig, EncodersConfig
from megasora.data.manifest import Clip
from megasora.data.plan import PlannedClip, plan_clip, request_of
from megasora.training.autoencoder.feed import spread_out


def planned(num_frames: int, *, fps: float = 24.0) -> PlannedClip:
    """5 of a clip's frames at 24 a second."""
    clip = Clip(row=0, id="a", path="a.mp4", text="", num_frames=num_frames, height=64, width=64, fps=fps)
    data = DataConfig(frame_counts=(5,), resolution="64px", text_tokens=0, target_fps=24.0)
    return plan_clip(clip, data=data, encoders=EncodersConfig(), patch_size=1)


@pytest.mark.parametrize(
    ("frames", "uniform", "stride", "starts"),
    [
        (5, 0.99, 1, 1),  # no room
        (9, 0.99, 2, 1),  # 0 2 4 6 8
        (9, 0.49, 1, 5),
        (40, 0.01, 1, 36),
        (40, 0.99, 8, 8),  # 33 frames of 40, at most 8 apart
        (20, 0.99, 4, 4),  # 5 apart would need 21 frames
        (20, 0.50, 3, 8),
    ],
)
def test_an_interval_is_one_of_those_that_fit(frames: int, uniform: float, stride: int, starts: int) -> None:
    clip = spread_out(planned(frames), most=8, uniform=uniform)
    assert (clip.stride, clip.num_starts) == (stride, starts)
    last = request_of(clip, offset=starts - 1)
    assert last.start + (last.num_frames - 1) * last.stride <= frames - 1


def test_intervals_multiply_the_stride_that_the_rate_asks_for() -> None:
    clip = spread_out(planned(40, fps=48.0), most=8, uniform=0.99)
    assert clip.stride == 2 * 4  # (40 - 1) // (4 x 2) = 4

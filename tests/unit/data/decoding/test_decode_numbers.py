"""Frame numbers: exact at any start, in any container, at a variable frame rate; and what a corrupt frame spoils."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from megasora.data.decoding.contract import DecodeError, DecodeRequest
from megasora.data.decoding.dali import DaliDecoder
from megasora.data.decoding.pyav import PyAVDecoder

FRAMES, KEY_INTERVAL = 150, 30
EVEN = range(FRAMES)
UNEVEN = np.cumsum(np.where(np.arange(FRAMES) % 7 == 3, 5, 1)).tolist()
"""Ticks of a variable frame rate: every seventh frame stays on for five."""


def request(path: Path, *, start: int, stride: int = 1, num_frames: int = 3) -> DecodeRequest:
    return DecodeRequest(path=str(path), start=start, stride=stride, num_frames=num_frames, height=48, width=64)


def make(path: Path, *, ticks: Sequence[int], codec: str, options: dict[str, str]) -> Path:
    """A clip of coloured squares, new ones in every frame, with a key frame every 30 frames; shown at the given ticks of 1/25 s."""
    squares = np.random.default_rng(0).integers(0, 255, (len(ticks), 3, 4, 3), dtype=np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    with av.open(str(path), "w") as target:
        stream = target.add_stream(codec, rate=25, options={"g": str(KEY_INTERVAL), **options})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 25)
        for picture, tick in zip(squares, ticks, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = tick, Fraction(1, 25)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return path


X264 = {"bf": "3", "sc_threshold": "0"}
OPEN_GROUPS = {**X264, "x264-params": "open-gop=1"}
NO_KEY_FRAMES = {"x264-params": "intra-refresh=1"}
VP9 = {"deadline": "realtime", "cpu-used": "8"}


@pytest.mark.parametrize(
    ("name", "ticks", "codec", "options"),
    [
        ("even.mp4", EVEN, "libx264", X264),
        ("open.mp4", EVEN, "libx264", OPEN_GROUPS),
        ("refresh.mp4", EVEN, "libx264", NO_KEY_FRAMES),
        ("variable.mp4", UNEVEN, "libx264", X264),
        ("variable.mkv", UNEVEN, "libx264", OPEN_GROUPS),
        ("even.ts", EVEN, "libx264", OPEN_GROUPS),
        ("variable.webm", UNEVEN, "libvpx-vp9", VP9),
        ("hidden_frames.webm", EVEN, "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", **VP9}),
        ("old.avi", EVEN, "mpeg4", {"bf": "2"}),
    ],
)
def test_a_late_start_gives_the_frames_that_counting_from_the_file_s_start_gives(
    tmp_path: Path, name: str, ticks: Sequence[int], codec: str, options: dict[str, str]
) -> None:
    path = make(tmp_path / name, ticks=ticks, codec=codec, options=options)
    whole = PyAVDecoder().decode(request(path, start=0, num_frames=FRAMES))
    assert len({whole[:, number].numpy().tobytes() for number in range(FRAMES)}) == FRAMES  # so equal pictures are equal numbers
    for start in (64, 75, 76, 77, 89, 90, 91, 106, 119, 120, 147):
        assert torch.equal(PyAVDecoder().decode(request(path, start=start)), whole[:, start : start + 3]), start
    assert torch.equal(PyAVDecoder().decode(request(path, start=100, stride=7, num_frames=8)), whole[:, 100::7])
    for start in (148, 150, 1000):
        with pytest.raises(DecodeError, match="of 3 frames"):
            PyAVDecoder().decode(request(path, start=start))


def test_dali_numbers_frames_of_a_variable_rate_the_same_way(tmp_path: Path) -> None:
    path = make(tmp_path / "variable.webm", ticks=UNEVEN, codec="libvpx-vp9", options=VP9)
    wanted = request(path, start=100, stride=3, num_frames=5)
    by_dali, by_pyav = DaliDecoder(device=torch.device("cpu")).decode(wanted), PyAVDecoder().decode(wanted)
    distance = (by_dali[:, :, None] - by_pyav[:, None, :]).abs().mean(dim=(0, 3, 4))
    assert distance.argmin(dim=1).tolist() == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frame 70 of an H.264 file is damaged; key frames are 0, 30, 60, ..."""
    path = make(tmp_path_factory.mktemp("clips") / "damaged.mp4", ticks=EVEN, codec="libx264", options={**X264, "bf": "0"})
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        index = container.streams.video[0].index_entries
        assert [number for number in range(FRAMES) if index[number].is_keyframe] == [0, 30, 60, 90, 120]
        entry = index[70]
        middle = entry.pos + entry.size // 2
        content[middle : middle + 40] = bytes(value ^ 0xA5 for value in content[middle : middle + 40])
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("start", [66, 70, 80, 87])
def test_a_corrupt_frame_between_the_key_frame_and_the_end_is_an_error(damaged: Path, start: int) -> None:
    with pytest.raises(DecodeError, match=str(damaged)):
        PyAVDecoder().decode(request(damaged, start=start, num_frames=5))


def test_a_corrupt_frame_costs_nothing_before_it_or_after_the_next_key_frame(damaged: Path) -> None:
    for start in (0, 58, 64, 106, 120):
        assert PyAVDecoder().decode(request(damaged, start=start)).shape == (3, 3, 48, 64)


def test_identity_names_the_libraries_that_made_the_pixels() -> None:
    assert PyAVDecoder().identity.startswith(f"pyav {av.__version__} libavcodec ")

"""Curation and training number frames alike: the same pictures under the same numbers, wherever a read begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation

from megasora.curation import frames as curation
from megasora.curation.frames import DamagedClipError, Span, read_frames
from megasora.data.decoding.contract import DecodeRequest
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.media.numbering import LostCountError

FRAMES = 150
EVEN = range(FRAMES)
UNEVEN = np.cumsum(np.where(np.arange(FRAMES) % 7 == 3, 5, 1)).tolist()
"""Ticks of a variable frame rate: every seventh frame stays on for five."""
ONE_THREAD = "threads=1:lookahead-threads=1"
"""With more, x264 now and then writes another file, whose damage no decoder notices."""
B_FRAMES = {"bf": "3", "sc_threshold": "0"}
OPEN_GROUPS = {**B_FRAMES, "x264-params": "open-gop=1"}
"""Frames after a key frame in the file and before it on the screen, predicted from before it."""


def make(path: Path, *, ticks: Sequence[int], options: dict[str, str]) -> Path:
    """A clip of coloured squares, new ones in every frame, with a key frame every 30 frames; shown at the given ticks of 1/25 s."""
    squares = np.random.default_rng(0).integers(0, 255, (FRAMES, 3, 4, 3), dtype=np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=25, options={"g": "30", **options})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 25)
        for picture, tick in zip(squares, ticks, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = tick, Fraction(1, 25)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return path


def rgb(frame: av.VideoFrame) -> bytes:
    """The picture as the decoder converts it, [3, height, width]."""
    exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    planes = frame.reformat(format="gbrp", width=frame.width, height=frame.height, interpolation=exact, threads=1).to_ndarray()
    return np.moveaxis(planes, -1, 0).tobytes()


CASES = [
    ("even.mp4", EVEN, B_FRAMES),
    ("open.mp4", EVEN, OPEN_GROUPS),
    ("open.ts", EVEN, OPEN_GROUPS),
    ("variable.mp4", UNEVEN, B_FRAMES),
    ("variable.mkv", UNEVEN, OPEN_GROUPS),
    ("refresh.mp4", EVEN, {"x264-params": "intra-refresh=1"}),  # no second key frame: the count is lost, and begun again
]


@pytest.mark.parametrize(("name", "ticks", "options"), CASES, ids=[case[0] for case in CASES])
def test_curation_and_the_decoder_give_the_same_numbers_and_pixels(
    tmp_path: Path, name: str, ticks: Sequence[int], options: dict[str, str]
) -> None:
    path = str(make(tmp_path / name, ticks=ticks, options=options))
    whole = [rgb(frame) for _, frame in read_frames(Span(path=path, start=0, end=FRAMES))]
    assert len(set(whole)) == FRAMES  # so equal pictures are equal numbers
    for start in (0, 31, 63, 64, 76, 89, 90, 91, 119, 120, 147):  # key frames 0, 30, ...; seeks from 64 on
        read = [(number, rgb(frame)) for number, frame in read_frames(Span(path=path, start=start, end=start + 3))]
        assert read == [(start + k, whole[start + k]) for k in range(3)], start
        request = DecodeRequest(path=path, start=start, stride=1, num_frames=3, height=48, width=64)
        pixels = PyAVDecoder().pixels(request).numpy()
        assert [pixels[:, k].tobytes() for k in range(3)] == whole[start : start + 3], start


@pytest.fixture
def clip(tmp_path: Path) -> str:
    return str(make(tmp_path / "clip.mp4", ticks=EVEN, options=B_FRAMES))


def lose_the_count(monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """A read that seeks loses its count after some frames."""
    real = curation.numbered_frames

    def lost(*args: Any, seek: bool, **changes: Any) -> Iterator[tuple[int, av.VideoFrame]]:
        for number, frame in real(*args, seek=seek, **changes):
            if seek and number >= after:
                raise LostCountError("packets carry no time stamps")
            yield number, frame

    monkeypatch.setattr(curation, "numbered_frames", lost)


def test_a_count_lost_before_the_first_frame_is_begun_again(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_the_count(monkeypatch, after=99)
    assert [number for number, _ in read_frames(Span(path=clip, start=100, end=103))] == [100, 101, 102]


def test_a_count_lost_later_is_damage_of_the_next_frame(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_the_count(monkeypatch, after=102)
    with pytest.raises(DamagedClipError, match="after frame 101: packets carry no time stamps") as caught:
        list(read_frames(Span(path=clip, start=100, end=110)))
    assert caught.value.frame == 102


def corrupt(path: str, number: int) -> None:
    """Overwrite the middle of a packet."""
    with av.open(path) as container:
        entry = container.streams.video[0].index_entries[number]
    content = bytearray(Path(path).read_bytes())
    middle = entry.pos + entry.size // 2
    content[middle : middle + 40] = bytes(value ^ 0xA5 for value in content[middle : middle + 40])
    Path(path).write_bytes(content)


def test_a_corrupt_frame_is_named_and_costs_nothing_after_the_next_key_frame(tmp_path: Path) -> None:
    path = str(make(tmp_path / "clip.mp4", ticks=EVEN, options={**B_FRAMES, "bf": "0", "x264-params": ONE_THREAD}))
    corrupt(path, 70)
    for start in (0, 40, 66, 80):
        with pytest.raises(DamagedClipError) as caught:
            list(read_frames(Span(path=path, start=start, end=start + 75)))
        assert caught.value.frame == 70, start
    for start in (90, 100):
        assert [number for number, _ in read_frames(Span(path=path, start=start, end=start + 3))] == [start, start + 1, start + 2]

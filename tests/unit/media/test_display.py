"""Pictures that are stored turned, mirrored or with pixels that are not square: shown as they are meant, or refused, by every reader."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from megasora.curation.frames import Span, full_bgr, read_frames
from megasora.curation.probe import clip_id, probe_row
from megasora.curation.settings import ShotsSettings
from megasora.curation.shots import cut_row
from megasora.data.decoding import dali as dali_module
from megasora.data.decoding.contract import DecodeError, DecodeRequest, normalise
from megasora.data.decoding.dali import DaliDecoder, MixedDecoder
from megasora.data.decoding.pyav import PyAVDecoder, video_facts
from megasora.media.display import is_square

HEIGHT, WIDTH = 48, 64
"""As stored."""
R, G, B, W = (200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 200)
Quarters = list[list[tuple[int, int, int]]]
STORED: Quarters = [[R, G], [B, W]]


def quarters(colours: Quarters) -> np.ndarray:
    """uint8 [48, 64, 3]: four colours, one in each quarter."""
    return np.array(colours, np.uint8).repeat(HEIGHT // 2, axis=0).repeat(WIDTH // 2, axis=1)


def make(
    path: Path,
    picture: np.ndarray,
    *,
    aspect: Fraction | None = None,
    turn: tuple[float, bool, bool] | None = None,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    num_frames: int = 4,
) -> str:
    """A clip of one picture, with pixels of an aspect, shown turned by (degrees counter-clockwise, then hflip, vflip)."""
    with av.open(str(path), "w") as target:
        stream = target.add_stream(codec, rate=25, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pixel_format
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if turn is not None:
            stream.set_display_rotation(turn[0], hflip=turn[1], vflip=turn[2])
        for _ in range(num_frames):
            target.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format)))
        target.mux(stream.encode())
    return str(path)


def request(path: str, *, height: int, width: int, crop: tuple[int, int, int, int] | None = None) -> DecodeRequest:
    return DecodeRequest(path=path, start=0, stride=1, num_frames=2, height=height, width=width, crop=crop)


def assert_shows(picture: np.ndarray, expected: Quarters) -> None:
    """A picture [height, width, 3] has these colours in its quarters, up to what the codec and the edges take."""
    height, width = picture.shape[0] // 2, picture.shape[1] // 2
    for row in range(2):
        for column in range(2):
            inside = picture[row * height + 4 : (row + 1) * height - 4, column * width + 4 : (column + 1) * width - 4].astype(float)
            assert np.abs(inside.mean(axis=(0, 1)) - expected[row][column]).max() < 8, (row, column, inside.mean(axis=(0, 1)))


def shown(wanted: DecodeRequest) -> np.ndarray:
    """Last frame by PyAV, [height, width, 3]."""
    return PyAVDecoder().pixels(wanted)[:, -1].permute(1, 2, 0).numpy()


TURNS: list[tuple[tuple[float, bool, bool], Quarters]] = [
    ((90, False, False), [[G, W], [R, B]]),
    ((180, False, False), [[W, B], [G, R]]),
    ((-90, False, False), [[B, R], [W, G]]),
    ((0, True, False), [[G, R], [W, B]]),
    ((0, False, True), [[B, W], [R, G]]),
    ((90, True, False), [[W, G], [B, R]]),
    ((90, False, True), [[R, B], [G, W]]),
]
"""[[red, green], [blue, white]], turned by hand."""


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p"])
@pytest.mark.parametrize(("turn", "expected"), TURNS)
def test_pyav_turns_pictures_upright(tmp_path: Path, turn: tuple[float, bool, bool], expected: Quarters, pixel_format: str) -> None:
    path = make(tmp_path / "clip.mp4", quarters(STORED), turn=turn, pixel_format=pixel_format)
    height, width = (WIDTH, HEIGHT) if abs(turn[0]) == 90 else (HEIGHT, WIDTH)
    assert_shows(shown(request(path, height=height, width=width)), expected)


def test_a_turn_is_exact_to_the_pixel(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(40, 200, (HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    plain = shown(request(make(tmp_path / "plain.mp4", noise), height=HEIGHT, width=WIDTH)).astype(int)
    turned = shown(request(make(tmp_path / "turned.mp4", noise, turn=(90, False, False)), height=WIDTH, width=HEIGHT)).astype(int)
    difference = np.abs(turned - np.rot90(plain))
    assert difference.max() <= 2 and difference.mean() < 0.6  # chroma is rounded once more; moved by half a pixel it would be off by 20


def test_the_crop_is_of_stored_pixels_and_cut_before_the_turn(tmp_path: Path) -> None:
    path = make(tmp_path / "clip.mp4", quarters(STORED), turn=(90, False, False))
    picture = shown(request(path, height=32, width=24, crop=(32, 0, 32, 24)))  # the upper right quarter: green
    assert_shows(picture, [[G, G], [G, G]])
    with pytest.raises(DecodeError, match="outside 64x48"):
        PyAVDecoder().pixels(request(path, height=32, width=24, crop=(0, 0, 48, 64)))


def test_pyav_makes_pixels_square(tmp_path: Path) -> None:
    """64 x 48 pixels twice as wide as high are 128 x 48; half as wide, 32 x 48."""
    bar = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    bar[:, 16:48] = 200
    wide, narrow = (make(tmp_path / f"{name}.mp4", bar, aspect=aspect) for name, aspect in (("w", Fraction(2)), ("n", Fraction(1, 2))))
    bright = shown(request(wide, height=48, width=128)).mean(axis=(0, 2)) > 120
    assert bright.nonzero()[0].tolist() == list(range(32, 96))
    assert shown(request(wide, height=48, width=64))[:, 2:-2].min() > 180  # the middle 64 of 128 are the bar
    bright = shown(request(narrow, height=48, width=32)).mean(axis=(0, 2)) > 120
    assert bright.nonzero()[0].tolist() == list(range(8, 24))
    # cut to 32 x 48 stored pixels, shown as 64 x 48, enlarged to cover 48 x 128: 128 wide and 96 high
    assert shown(request(wide, height=48, width=128, crop=(16, 0, 32, 48)))[:, 4:-4].min() > 180


def test_a_turned_picture_of_wide_pixels_is_high(tmp_path: Path) -> None:
    """64 x 48 pixels twice as wide as high, turned by a quarter: 48 wide and 128 high."""
    path = make(tmp_path / "clip.mp4", quarters(STORED), aspect=Fraction(2), turn=(90, False, False))
    assert_shows(shown(request(path, height=128, width=48)), [[G, W], [R, B]])


def test_a_turn_that_is_no_quarter_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "clip.mp4", quarters(STORED), turn=(45, False, False))
    with pytest.raises(DecodeError, match="turned by 45 degrees, which is no quarter turn; re-encode it upright"):
        PyAVDecoder().pixels(request(path, height=48, width=64))


def test_dali_refuses_what_it_would_show_wrong_and_mixed_gives_it_to_pyav(tmp_path: Path) -> None:
    dali = DaliDecoder(device=torch.device("cpu"))
    mixed = MixedDecoder(dali=dali, pyav=PyAVDecoder())
    turned = make(tmp_path / "turned.webm", quarters(STORED), turn=(90, False, False), codec="libvpx-vp9")
    wide = make(tmp_path / "wide.mp4", quarters(STORED), aspect=Fraction(2), codec="libvpx-vp9")
    plain = make(tmp_path / "plain.webm", quarters(STORED), codec="libvpx-vp9")
    nearly = make(tmp_path / "nearly.mp4", quarters(STORED), aspect=Fraction(201, 200), codec="libvpx-vp9")
    requests = [request(path, height=48, width=48) for path in (turned, wide, plain, nearly)]
    results = dali.pixels_many(requests)
    cure = "which DALI does not do; use --data.decoder pyav or mixed, or re-encode it with megasora data shots --clips"
    assert [str(result) for result in results[:2]] == [
        f"{turned}: it is to be shown turned, {cure}",
        f"{wide}: it is to be shown with pixels 2 times as wide as high, {cure}",
    ]
    assert all(isinstance(result, torch.Tensor) for result in results[2:])
    assert [mixed.dali.decodes(video_facts(one.path)) for one in requests] == [False, False, True, True]
    for one, result in zip(requests[:2], mixed.pixels_many(requests), strict=False):
        assert isinstance(result, torch.Tensor) and torch.equal(result, PyAVDecoder().pixels(one))


def test_mixed_looks_at_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(dali_module, "video_facts", lambda path, **known: (looked.append(path), video_facts(path, **known))[1])
    mixed = MixedDecoder(dali=DaliDecoder(device=torch.device("cpu")), pyav=PyAVDecoder())
    path = make(tmp_path / "plain.webm", quarters(STORED), codec="libvpx-vp9")
    wanted = request(path, height=48, width=64)
    assert isinstance(mixed.pixels_many([wanted])[0], torch.Tensor) and looked == [path]
    assert torch.equal(mixed.decode(wanted), normalise(mixed.pixels(wanted))) and looked == [path] * 3


@pytest.mark.parametrize(("aspect", "square"), [(1.0, True), (1281 / 1280, True), (0.991, True), (1.011, False), (12 / 11, False)])
def test_one_percent_counts_as_square(aspect: float, square: bool) -> None:
    assert is_square(aspect) == square


def probed(path: str) -> dict[str, object]:
    (row,) = probe_row({"id": clip_id(path), "path": path, "text": ""}, sidecar=False)
    assert row["error"] == ""
    return row


def test_probe_records_the_aspect_of_pixels(tmp_path: Path) -> None:
    wide, plain = make(tmp_path / "wide.mp4", quarters(STORED), aspect=Fraction(16, 11)), make(tmp_path / "plain.mp4", quarters(STORED))
    assert (probed(wide)["sample_aspect_ratio"], probed(plain)["sample_aspect_ratio"]) == (16 / 11, 1.0)


@pytest.mark.parametrize(
    ("aspect", "turn", "size", "expected"),
    [
        (Fraction(2), (0, False, False), (48, 128), STORED),
        (Fraction(1, 2), (0, False, False), (48, 32), STORED),
        (Fraction(2), (90, False, False), (128, 48), [[G, W], [R, B]]),
        (Fraction(1), (180, False, False), (48, 64), [[W, B], [G, R]]),
        (Fraction(1), (-90, False, False), (64, 48), [[B, R], [W, G]]),
    ],
)
def test_reencoded_shots_are_upright_with_square_pixels(
    tmp_path: Path, aspect: Fraction, turn: tuple[float, bool, bool], size: tuple[int, int], expected: Quarters
) -> None:
    path = make(tmp_path / "clip.mp4", quarters(STORED), aspect=aspect, turn=turn, num_frames=10)
    (tmp_path / "clips").mkdir()
    settings = ShotsSettings(output=tmp_path / "x.parquet", clips=tmp_path / "clips", min_seconds=0.1)
    (shot,) = cut_row(probed(path), settings=settings)
    again = probed(str(shot["path"]))
    for row in (shot, again):
        assert (row["height"], row["width"], row["rotation"], row["sample_aspect_ratio"]) == (*size, 0, 1.0)
    ((_, frame),) = read_frames(Span(path=str(shot["path"]), start=0, end=1))
    assert_shows(full_bgr(frame, None)[:, :, ::-1], expected)


def test_a_shot_turned_by_no_quarter_is_a_row_with_the_reason(tmp_path: Path) -> None:
    path = make(tmp_path / "clip.mp4", quarters(STORED), turn=(45, False, False), num_frames=10)
    (tmp_path / "clips").mkdir()
    settings = ShotsSettings(output=tmp_path / "x.parquet", clips=tmp_path / "clips", min_seconds=0.1)
    (shot,) = cut_row(probed(path), settings=settings)
    assert "turned by 45 degrees" in shot["error"] and shot["path"] == path and not list((tmp_path / "clips").rglob("*.mp4"))

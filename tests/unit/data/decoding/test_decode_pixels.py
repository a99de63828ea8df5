"""Pixels: full chroma, crops that move nothing, every pixel format, the same bytes from every thread."""

from __future__ import annotations

import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megasora.data.decoding.contract import DecodeError, DecodeRequest, normalise
from megasora.data.decoding.dali import DaliDecoder
from megasora.data.decoding.pyav import PyAVDecoder
from megasora.data.loader import ClipLoader

LEVEL = 1 / 127.5
"""One of 255 levels."""


def waves(num_frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [T, H, W, 3]: coloured waves that move, with edges, inside the range that both YUV matrices can show."""
    t = np.arange(num_frames)[:, None, None] / 5
    y, x = np.arange(height)[:, None] / 9, np.arange(width)[None, :] / 7
    colours = np.stack([np.sin(x + t) + 0 * y, np.sign(np.sin(y - t)) + 0 * x, np.sin(x + y + t)], axis=-1)
    return np.rint(128 + 50 * colours).astype(np.uint8)


def make(path: Path, *, size: tuple[int, int], codec: str, pixel_format: str = "yuv420p", num_frames: int = 4) -> Path:
    with av.open(str(path), "w") as target:
        stream = target.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, pixel_format
        for picture in waves(num_frames, *size):
            target.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format)))
        target.mux(stream.encode())
    return path


def request(
    path: Path, *, height: int = 48, width: int = 64, crop: tuple[int, int, int, int] | None = None, num_frames: int = 2
) -> DecodeRequest:
    return DecodeRequest(path=str(path), start=0, stride=1, num_frames=num_frames, height=height, width=width, crop=crop)


def by_definition(path: Path, size: tuple[int, int]) -> torch.Tensor:
    """First frame from its planes, in double precision: antialiased bicubic, then the BT.601 matrix for limited range."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        planes = [
            torch.from_numpy(np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, : plane.width].copy()).double()[None, None]
            for plane in frame.planes
        ]
    y, u, v = (F.interpolate(plane, size, mode="bicubic", antialias=True)[0, 0] for plane in planes)
    luma, blue, red = (y - 16) * 255 / 219, (u - 128) * 255 / 224, (v - 128) * 255 / 224
    rgb = torch.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue])
    return rgb.clamp(0, 255).div(127.5).sub(1).float()


@pytest.mark.parametrize("size", [(48, 96), (48, 95), (96, 192)], ids=["even", "odd", "source"])
def test_pixels_are_those_of_the_definition_at_every_size(tmp_path: Path, size: tuple[int, int]) -> None:
    path = make(tmp_path / "clip.mkv", size=(96, 2 * size[1] if size[0] == 48 else size[1]), codec="ffv1")
    error = (PyAVDecoder().decode(request(path, height=size[0], width=size[1]))[:, 0] - by_definition(path, size)).abs()
    assert float(error.mean()) < 0.5 * LEVEL  # rounding; halved or nearest chroma costs two levels and more


def test_a_crop_is_the_cut_of_the_whole_picture_at_any_offset(tmp_path: Path) -> None:
    path = make(tmp_path / "clip.mp4", size=(96, 128), codec="libx264")
    whole = PyAVDecoder().decode(request(path, height=96, width=128))
    for x, y in ((16, 8), (17, 8), (16, 9), (17, 9)):
        cut = PyAVDecoder().decode(request(path, height=64, width=96, crop=(x, y, 96, 64)))
        difference = (cut - whole[:, :, y : y + 64, x : x + 96]).abs()[:, :, 2:-2, 2:-2]  # chroma is interpolated across the cut
        assert float(difference.mean()) < 1 * LEVEL, (x, y)


def test_a_cropped_black_border_does_not_bleed_in(tmp_path: Path) -> None:
    path = tmp_path / "border.webm"
    with av.open("color=white:size=96x64:rate=25,pad=128:96:16:16:black", format="lavfi") as source, av.open(str(path), "w") as target:
        stream = target.add_stream("libvpx-vp9", rate=25, options={"crf": "4", "b": "0"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for frame, _ in zip(source.decode(video=0), range(4), strict=False):
            target.mux(stream.encode(frame.reformat(format="yuv420p")))
        target.mux(stream.encode())
    wanted = request(path, height=16, width=24, crop=(16, 16, 96, 64))
    for decoder in (PyAVDecoder(), DaliDecoder(device=torch.device("cpu"))):
        assert float(decoder.decode(wanted).min()) > 1 - 6 * LEVEL


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [
        ("ten_bit.mkv", "ffv1", "yuv420p10le"),
        ("full_range.avi", "mjpeg", "yuvj420p"),
        ("wide_chroma.mkv", "ffv1", "yuv422p"),
        ("rgb.mkv", "ffv1", "bgr0"),
        ("gray.mkv", "ffv1", "gray"),
    ],
)
def test_every_pixel_format_gives_the_same_picture(tmp_path: Path, name: str, codec: str, pixel_format: str) -> None:
    plain = PyAVDecoder().decode(request(make(tmp_path / "plain.mkv", size=(96, 128), codec="ffv1")))
    other = PyAVDecoder().decode(request(make(tmp_path / name, size=(96, 128), codec=codec, pixel_format=pixel_format)))
    if pixel_format == "gray":
        weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None, None]
        plain = (plain * weights).sum(dim=0, keepdim=True).expand(3, -1, -1, -1)
    assert float((other - plain).abs().mean()) < 4 * LEVEL


def test_threads_and_repeats_give_the_same_bytes(tmp_path: Path) -> None:
    path = make(tmp_path / "clip.mp4", size=(96, 128), codec="libx264", num_frames=20)
    wanted, decoder = request(path, num_frames=20), PyAVDecoder()
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(decoder.decode(wanted))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, decoder.decode(wanted)) for result in results) and len(results) == 4


def test_levels_normalised_later_are_the_same_bits(tmp_path: Path) -> None:
    path = make(tmp_path / "clip.mp4", size=(96, 128), codec="libx264")
    wanted, decoder = request(path), PyAVDecoder()
    assert decoder.pixels(wanted).dtype == torch.uint8
    assert torch.equal(normalise(decoder.pixels(wanted)), decoder.decode(wanted))
    loader = ClipLoader(iter([[wanted]]), decoder=decoder, workers=1, ahead=1, give="pixels")
    (step,) = loader
    (clip,) = step.clips
    assert isinstance(clip, torch.Tensor) and torch.equal(clip, decoder.pixels(wanted))
    assert step.pixel_bytes == clip.numel()


def test_an_impossible_crop_is_an_error_that_names_the_size(tmp_path: Path) -> None:
    path = make(tmp_path / "clip.mp4", size=(96, 128), codec="libx264")
    for crop in ((100, 0, 64, 48), (-1, 0, 64, 48), (0, 0, 0, 48)):
        with pytest.raises(DecodeError, match="outside 128x96"):
            PyAVDecoder().decode(request(path, crop=crop))

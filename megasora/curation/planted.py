"""Clips with one known defect each, made from good ones: to try rules on, before they are let loose on a million files.

Each clip says which rule must find it, so `benchmarks/pyramid.py` can hold the whole pyramid against the truth. Deterministic; the sources
are any real clips, or `scene`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

Pictures = list[NDArray[np.uint8]]
"""BGR pictures of one clip."""

HEIGHT, WIDTH, FPS = 288, 512, 25


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A made clip and what must become of it."""

    name: str
    found_by: str
    """The rule that must remove it; `kept` for a good one; `shots` when the cutting must mend it and every piece is good."""
    about: str


def read_pictures(path: Path, *, count: int = 75, start: int = 0) -> Pictures:
    """Frames of a clip at the made clips' size, cut to their aspect."""
    pictures: Pictures = []
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number >= start:
                pictures.append(_fitted(frame.to_ndarray(format="bgr24")))
            if len(pictures) == count:
                break
    return pictures


def scene(seed: int, *, count: int = 75, height: int = HEIGHT, width: int = WIDTH) -> Pictures:
    """A camera moving over a coloured landscape of noise on all scales (1/f), the same for the same seed; no text, no cut, never still."""
    generator = np.random.default_rng(seed)
    margin = 2 * count
    canvas = np.zeros((height + margin, width + margin, 3), np.float32)
    for scale in (2, 4, 8, 16, 32, 64, 128):
        coarse = generator.standard_normal((canvas.shape[0] // scale + 2, canvas.shape[1] // scale + 2, 3)).astype(np.float32)
        canvas += cv2.resize(coarse, canvas.shape[1::-1], interpolation=cv2.INTER_CUBIC) * scale**0.4
    canvas = np.clip(canvas / canvas.std() * 40 + 118, 0, 255).astype(np.uint8)
    right, down = ((2, 1), (1, 2), (2, 0), (0, 2))[seed % 4]
    return [np.ascontiguousarray(canvas[down * k : down * k + height, right * k : right * k + width]) for k in range(count)]


def make_planted(folder: Path, *, first: Pictures, second: Pictures, only: Collection[str] | None = None) -> list[Planted]:
    """Write the clips; returns what must become of each.

    Args:
        folder: made if it is not there.
        first: at least 75 pictures of one moving scene.
        second: the same of another.
        only: names of the clips to make; None makes all (about 10 s).
    """
    folder.mkdir(parents=True, exist_ok=True)
    plans = [*_contents(first, second), *((name, "broken", about, make) for name, about, make in _broken(first))]
    made = [plan for plan in plans if only is None or plan[0] in only]
    for name, _, _, make in made:
        make(folder / name)
    return [Planted(name=name, found_by=found_by, about=about) for name, found_by, about, _ in made]


_Plan = tuple[str, str, str, Callable[[Path], None]]


def _contents(first: Pictures, second: Pictures) -> Iterator[_Plan]:
    """Clips that decode, with what is wrong in them."""
    black, still = np.zeros_like(first[0]), first[0]
    yield "good.mp4", "kept", "75 good frames, H.264", lambda p: write_clip(p, first)
    yield "good_vp9.webm", "kept", "75 good frames of another scene, VP9", lambda p: write_clip(p, second, codec="libvpx-vp9")
    yield "short.mp4", "min_duration_s", "1.2 seconds", lambda p: write_clip(p, first[:30])
    yield "slow.mp4", "min_fps", "12 frames a second", lambda p: write_clip(p, first[::2], fps=12)
    yield "squeezed.mp4", "min_bits_per_pixel", "0.01 bits per pixel", lambda p: write_clip(p, first, options={"crf": "48"})
    yield "baseline.mp4", "banned_profiles", "Constrained Baseline", lambda p: write_clip(p, first, options={"profile": "baseline"})
    yield "turned.mp4", "upright", "to be shown turned by 90 degrees", lambda p: write_clip(p, first, turn=90)
    yield "anamorphic.mp4", "square_pixels", "pixels 16:11", lambda p: write_clip(p, first, aspect=Fraction(16, 11))
    yield "wide.mp4", "max_aspect", "4:1", lambda p: write_clip(p, [f[:128] for f in first])
    yield "tall.mp4", "max_aspect", "1:4", lambda p: write_clip(p, [np.ascontiguousarray(np.rot90(f[:128])) for f in first])
    yield (
        "small.mp4",
        "min_side_px",
        "64 pixels high",
        lambda p: write_clip(p, [cv2.resize(f, (128, 64)) for f in first], options={"crf": "12"}),
    )
    yield "black.mp4", "max_black_share", "all black", lambda p: write_clip(p, [black] * 75, options={"qp": "0"})
    yield "still.mp4", "max_freeze_share", "one picture for 3 seconds", lambda p: write_clip(p, [still] * 75, options={"crf": "4"})
    yield (
        "blurred.mp4",
        "min_blur_laplacian",
        "Gaussian blur, sigma 6",
        lambda p: write_clip(p, [cv2.GaussianBlur(f, (0, 0), 6) for f in first], options={"crf": "8"}),
    )
    yield (
        "dark.mp4",
        "max_dark_share",
        "4 % of its light",
        lambda p: write_clip(p, [(f * 0.04).astype(np.uint8) for f in first], options={"crf": "4"}),
    )
    yield (
        "burnt.mp4",
        "max_bright_share",
        "three times its light",
        lambda p: write_clip(p, [_brighter(f, 3.0, 60) for f in first], options={"crf": "12"}),
    )
    yield "shaken.mp4", "max_jitter", "moved by up to 40 pixels each frame", lambda p: write_clip(p, _shaken(first))
    yield (
        "fast.mp4",
        "max_vmaf_motion",
        "alternating scenes",
        lambda p: write_clip(p, [x for pair in zip(first, second, strict=False) for x in pair][:75]),
    )
    yield "titles.mp4", "max_text_area", "lines of text over the picture", lambda p: write_clip(p, [_titled(f) for f in first])
    yield from _copies_and_shots(first, second)


def _copies_and_shots(first: Pictures, second: Pictures) -> Iterator[_Plan]:
    """Clips with nothing wrong in them but that they are there twice, or that `shots` must cut."""
    yield (
        "copy.mp4",
        "duplicates",
        "good.mp4 smaller, brighter, encoded again",
        lambda p: write_clip(p, [_brighter(cv2.resize(f, (384, 216)), 1.05, 4) for f in first], options={"crf": "26"}),
    )
    yield "letterbox.mp4", "shots", "black bars of 40 pixels above and below", lambda p: write_clip(p, [_boxed(f) for f in second[::-1]])
    yield (
        "two_scenes.mp4",
        "shots",
        "a cut at frame 60",
        lambda p: write_clip(p, [f[:, ::-1] for f in second[:60]] + [f[::-1] for f in first[:60]]),
    )
    yield "long.mp4", "shots", "12 seconds: 8 and 4", lambda p: write_clip(p, _long(first, second))


def _broken(pictures: Pictures) -> Iterator[tuple[str, str, Callable[[Path], None]]]:
    """Files that cannot be read to their end."""
    yield "cut_tail.mp4", "the index at the end is gone", lambda p: _cut(p, pictures, {})
    yield "cut_data.mp4", "the index stands in front, half of the data is gone", lambda p: _cut(p, pictures, {"movflags": "faststart"})
    yield "cut.webm", "half of a VP9 file", lambda p: _cut(p, pictures, {}, codec="libvpx-vp9")
    yield "flipped.mp4", "one byte in 400 of the data is changed", lambda p: _flipped(p, pictures)
    yield "empty.mp4", "no byte", partial(_write, content=b"")
    yield "noise.mp4", "random bytes", partial(_write, content=np.random.default_rng(1).bytes(20_000))
    yield "text.mp4", "a text file by another name", partial(_write, content=b"not a clip\n" * 100)
    yield "sound.mp4", "sound without a picture", _sound


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def write_clip(
    path: Path,
    pictures: Sequence[NDArray[np.uint8]],
    *,
    fps: float = FPS,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    aspect: Fraction = Fraction(1),
    turn: float = 0.0,
) -> None:
    """Encode BGR pictures; sides are cut to even numbers.

    Args:
        path: by its ending, the container.
        pictures: as stored.
        fps: frames per second.
        codec: FFmpeg's name of an encoder.
        options: its options, and movflags.
        aspect: width of a pixel / its height, as the file says.
        turn: degrees counter-clockwise by which the file asks to be turned.
    """
    container_options = {name: value for name, value in (options or {}).items() if name == "movflags"}
    codec_options = {name: value for name, value in (options or {}).items() if name != "movflags"}
    if codec == "libvpx-vp9":
        codec_options = {"cpu-used": "8", "crf": "20", "b": "0", "g": "25", **codec_options}
    elif not {"crf", "qp"} & codec_options.keys():
        codec_options["crf"] = "18"
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options={"threads": "1", **codec_options})
        stream.height, stream.width = (side // 2 * 2 for side in pictures[0].shape[:2])
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if aspect != 1:
            stream.codec_context.sample_aspect_ratio = aspect
        if turn:
            stream.set_display_rotation(turn)
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[: stream.height, : stream.width]), format="bgr24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _fitted(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    scale = max(HEIGHT / picture.shape[0], WIDTH / picture.shape[1])
    size = (max(WIDTH, round(picture.shape[1] * scale)), max(HEIGHT, round(picture.shape[0] * scale)))
    resized = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (size[1] - HEIGHT) // 2, (size[0] - WIDTH) // 2
    return np.ascontiguousarray(resized[top : top + HEIGHT, left : left + WIDTH]).astype(np.uint8)


def _brighter(picture: NDArray[np.uint8], factor: float, offset: float) -> NDArray[np.uint8]:
    return np.clip(picture.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)


def _shaken(pictures: Pictures) -> Pictures:
    moves = np.random.default_rng(2).integers(-40, 41, (len(pictures), 2))
    return [np.roll(picture, tuple(move), (0, 1)) for picture, move in zip(pictures, moves, strict=True)]


def _titled(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    titled = picture.copy()
    for line in range(5):
        place = (20, 50 + 50 * line)
        cv2.putText(titled, f"SUBSCRIBE NOW LINE {line + 1}", place, cv2.FONT_HERSHEY_DUPLEX, 1.2, (255, 255, 255), 2)
    return titled


def _boxed(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    boxed = picture.copy()
    boxed[:40] = boxed[-40:] = 0
    return boxed


def _long(first: Pictures, second: Pictures) -> Pictures:
    """300 frames of slow camera motion over one picture: no cut, never still."""
    picture = cv2.resize(np.concatenate([second[0], first[-1]], axis=1), (2 * WIDTH + 304, HEIGHT))
    return [np.ascontiguousarray(picture[:, 4 * k : 4 * k + WIDTH]) for k in range(0, 304)][:300]


def _cut(path: Path, pictures: Pictures, options: dict[str, str], codec: str = "libx264") -> None:
    write_clip(path, pictures, options=options, codec=codec)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _flipped(path: Path, pictures: Pictures) -> None:
    write_clip(path, pictures, options={"movflags": "faststart"})
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    generator = np.random.default_rng(3)
    places = generator.integers(8_000, len(content), len(content) // 400)
    content[places] ^= generator.integers(1, 256, len(places)).astype(np.uint8)
    path.write_bytes(content.tobytes())


def _sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        for number in range(20):
            frame.pts = 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

"""Damaged copies of small media files, for hardening: what disks, networks and unlucky encoders do, at random but reproducible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megasora.curation.planted import scene, write_clip

Bytes = NDArray[np.uint8]

SEED_CLIPS: dict[str, dict[str, str]] = {
    "h264.mp4": {"codec": "libx264"},
    "h264_front.mp4": {"codec": "libx264", "movflags": "faststart"},
    "hevc.mp4": {"codec": "libx265", "x265-params": "log-level=none:pools=none"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx", "crf": "10"},
    "av1.mp4": {"codec": "libsvtav1", "preset": "12", "svtav1-params": "lp=1"},
    "mjpeg.avi": {"codec": "mjpeg"},
    "mpeg4.mkv": {"codec": "mpeg4"},
    "h264.ts": {"codec": "libx264"},
}
"""Name -> encoder and its options."""


def make_seed_clips(folder: Path, *, frames: int = 32, height: int = 64, width: int = 96) -> list[Path]:
    """One small clip of every codec and container, and two images."""
    import cv2

    folder.mkdir(parents=True, exist_ok=True)
    pictures = scene(5, count=frames, height=height, width=width)
    for name, options in SEED_CLIPS.items():
        rest = {key: value for key, value in options.items() if key != "codec"}
        write_clip(folder / name, pictures, codec=options["codec"], options=rest)
    for name in ("still.png", "still.jpg"):
        cv2.imwrite(str(folder / name), pictures[0])
    return sorted(folder.iterdir())


def mutated(content: bytes, *, seed: int) -> tuple[str, bytes]:
    """(name of the mutation, damaged copy)."""
    generator = np.random.default_rng(seed)
    name = sorted(MUTATIONS)[int(generator.integers(len(MUTATIONS)))]
    return name, MUTATIONS[name](np.frombuffer(content, np.uint8).copy(), generator).tobytes()


def _flips(share: float | int) -> Callable[[Bytes, np.random.Generator], Bytes]:
    def flip(content: Bytes, generator: np.random.Generator) -> Bytes:
        count = share if isinstance(share, int) else max(1, int(share * len(content)))
        places = generator.integers(0, len(content), count)
        content[places] ^= (1 << generator.integers(0, 8, count)).astype(np.uint8)
        return content

    return flip


def _span(content: Bytes, generator: np.random.Generator) -> tuple[int, int]:
    start = int(generator.integers(0, len(content)))
    return start, min(len(content), start + int(generator.integers(1, max(2, len(content) // 4))))


def _zeros(content: Bytes, generator: np.random.Generator) -> Bytes:
    start, end = _span(content, generator)
    content[start:end] = 0
    return content


def _lost(content: Bytes, generator: np.random.Generator) -> Bytes:
    start, end = _span(content, generator)
    return np.delete(content, slice(start, end))


def _repeated(content: Bytes, generator: np.random.Generator) -> Bytes:
    start, end = _span(content, generator)
    return np.concatenate([content[:end], content[start:]])


def _inserted(content: Bytes, generator: np.random.Generator) -> Bytes:
    start, end = _span(content, generator)
    return np.concatenate([content[:start], generator.integers(0, 256, end - start).astype(np.uint8), content[start:]])


def _swapped(content: Bytes, generator: np.random.Generator) -> Bytes:
    half = len(content) // 2
    start, end = _span(content[:half], generator)
    content[start:end], content[half + start : half + end] = content[half + start : half + end].copy(), content[start:end].copy()
    return content


def _truncated(content: Bytes, generator: np.random.Generator) -> Bytes:
    return content[: int(generator.integers(0, len(content)))]


def _header(content: Bytes, generator: np.random.Generator) -> Bytes:
    """Numbers of the header made huge, negative or odd."""
    for _ in range(int(generator.integers(1, 5))):
        place = int(generator.integers(0, min(1024, len(content)) - 4))
        content[place : place + 4] = generator.choice([[255] * 4, [127, 255, 255, 255], [0] * 4, [128, 0, 0, 0]])
    return content


def _index(content: Bytes, generator: np.random.Generator) -> Bytes:
    """The same at the end, where an mp4 without faststart keeps its tables."""
    return _header(content[::-1].copy(), generator)[::-1]


MUTATIONS: dict[str, Callable[[Bytes, np.random.Generator], Bytes]] = {
    "one bit flipped": _flips(1),
    "ten bits flipped": _flips(10),
    "one byte in 100 changed": _flips(0.01),
    "zeroed": _zeros,
    "lost": _lost,
    "repeated": _repeated,
    "inserted": _inserted,
    "swapped": _swapped,
    "truncated": _truncated,
    "header numbers": _header,
    "index numbers": _index,
}


def make_mutated(folder: Path, seeds: list[Path], *, count: int, first_seed: int = 0) -> dict[str, str]:
    """Write `count` damaged files, taking the seed clips in turn; returns name -> mutation."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = [(path, path.read_bytes()) for path in seeds]
    made: dict[str, str] = {}
    for number in range(count):
        path, content = contents[number % len(contents)]
        mutation, damaged = mutated(content, seed=first_seed + number)
        name = f"{number:05d}_{path.name}"
        (folder / name).write_bytes(damaged)
        made[name] = mutation
    return made

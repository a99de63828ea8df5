"""A small data set made from nothing: clips from libavfilter's test sources, captions that describe them, and two manifests.

Deterministic, about a second to make, no licence to mind. `tiny` trains on it when no manifest is given.
"""

from __future__ import annotations

import csv
import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av

from megasora.config.files import written_whole

COLUMNS = ("path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps")
"""The manifest's columns (Open-Sora's)."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One libavfilter source and what it shows."""

    graph: str
    text: str
    height: int
    width: int
    num_frames: int


SIZES = ((96, 96), (72, 120), (120, 72), (96, 128))
PATTERNS = (  # sources that draw the same frames every time; gradients, mandelbrot and life of libavfilter do not (docs/log.md)
    ("testsrc2=size={w}x{h}:rate=12", "A test card with moving bars and a running clock"),
    ("zoneplate=size={w}x{h}:rate=12:kt={n}:kx2=20:ky2=20:kxt=1", "Rings of a zone plate that drift and shimmer"),
    ("smptebars=size={w}x{h}:rate=12,rotate=a={n}+0.7*t", "Colour bars that turn around the centre"),
    ("rgbtestsrc=size={w}x{h}:rate=12,scroll=h=0.01*{n}:v=0.03", "Bands of red, green and blue that scroll by"),
)


def sources(num_clips: int) -> list[Source]:
    """The clips' sources; every fourth is shorter, every eighth an image."""
    result = []
    for number in range(num_clips):
        graph, text = PATTERNS[number % len(PATTERNS)]
        height, width = SIZES[(number // len(PATTERNS)) % len(SIZES)]
        frames = 1 if number % 8 == 7 else 12 if number % 4 == 3 else 25
        text = f"{text}, take {number + 1}"
        graph = graph.format(w=width, h=height, n=number + 1)
        result.append(Source(graph=graph, text=text, height=height, width=width, num_frames=frames))
    return result


def make_tiny_clips(folder: Path, *, num_clips: int = 16, num_eval: int = 4) -> tuple[Path, Path]:
    """Make the clips once; returns the training and the evaluation manifest."""
    manifests = folder / "train.csv", folder / "eval.csv"
    if all(path.exists() for path in manifests):
        return manifests
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(folder) as temporary:
        temporary.mkdir()
        rows = [_make(temporary, number, source) for number, source in enumerate(sources(num_clips + num_eval))]
        write_manifest(temporary / "train.csv", rows[:num_clips])
        write_manifest(temporary / "eval.csv", rows[num_clips:])
        if folder.exists():
            shutil.rmtree(folder)
    return manifests


def manifest_row(path: str, text: str, *, num_frames: int, height: int, width: int, fps: float) -> dict[str, object]:
    """A row with the derived columns filled in."""
    return {
        "path": path,
        "text": text,
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "aspect_ratio": round(height / width, 6),
        "resolution": height * width,
        "fps": fps,
    }


def write_manifest(path: Path, rows: list[dict[str, object]]) -> None:
    """Write a csv manifest."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _make(folder: Path, number: int, source: Source) -> dict[str, object]:
    image = source.num_frames == 1
    name = f"clip{number:03d}.{'png' if image else 'mp4'}"
    with av.open(source.graph, format="lavfi") as made, av.open(str(folder / name), "w", format="image2" if image else None) as target:
        stream = target.add_stream("png" if image else "libx264", rate=Fraction(12))
        stream.height, stream.width = source.height, source.width
        stream.pix_fmt = "rgb24" if image else "yuv420p"
        stream.thread_count = 1
        for frame, _ in zip(made.decode(video=0), range(source.num_frames), strict=False):
            target.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        target.mux(stream.encode())
    return manifest_row(name, source.text, num_frames=source.num_frames, height=source.height, width=source.width, fps=12.0)

"""What `megasora evaluate ae` is asked for. Imports nothing heavy: the command line makes its flags from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megasora.config.errors import UserError

TILE_OVERLAP = 0.25
"""Share that tiles and windows have in common (opensora/models/hunyuan_vae and dc_ae: tile_overlap_factor)."""
Dtype = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of the clips that go through."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.height}x{self.width}, {self.num_frames} frame{'s' if self.num_frames > 1 else ''}"


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How clips are cut into tiles; 0 does not cut."""

    size: int = 0
    """Pixels of a tile's side."""
    frames: int = 0
    """Frames of a window."""

    def __str__(self) -> str:
        return "whole" if not self.size and not self.frames else f"{self.size} px, {self.frames or 'all'} frames, overlap {TILE_OVERLAP}"


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is measured of which autoencoders on which clips."""

    weights: tuple[Path, ...]
    clips: Path
    out: Path
    shapes: tuple[Shape, ...]
    fps: float | None
    cutting: Cutting
    dtype: Dtype
    device: str
    limit: int | None
    select: Literal["model", "ema"]
    lpips: Path | None
    fid: Path | None
    fvd: Path | None
    shown: int


def shapes_of(sizes: str, frames: str) -> tuple[Shape, ...]:
    """Every size with every number of frames.

    Args:
        sizes: HEIGHTxWIDTH, or one number for a square, separated by commas.
        frames: numbers separated by commas.

    Raises:
        UserError: something else.
    """
    found = [(_size(word), _count(count)) for word in sizes.split(",") for count in frames.split(",")]
    shapes = (Shape(num_frames=count, height=height, width=width) for (height, width), count in found)
    return tuple(dict.fromkeys(shapes))


def _size(word: str) -> tuple[int, int]:
    parts = word.strip().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) for part in parts):
        raise UserError(f"--sizes {word!r} is no size: write HEIGHTxWIDTH or one number, separated by commas, such as 256x256,512x288")
    return int(parts[0]), int(parts[-1])


def _count(word: str) -> int:
    if not word.strip().isdigit() or not int(word):
        raise UserError(f"--frames {word!r} is no number of frames: write numbers separated by commas, such as 1,32")
    return int(word)


def cutting_of(word: str) -> Cutting:
    """`whole`, SIZE or SIZExFRAMES.

    Raises:
        UserError: something else.
    """
    if word == "whole":
        return Cutting()
    parts = word.split("x")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise UserError(f"--tiling {word!r}: write whole, SIZE in pixels, or SIZExFRAMES, such as 256x32 (0 does not cut)")
    return Cutting(size=int(parts[0]), frames=int(parts[1]) if len(parts) == 2 else 0)

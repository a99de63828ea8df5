"""Pictures of a reconstruction for the page: frames in their own size, their differences made visible, and a strip over time."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from megasora.data.decoding.writer import contact_sheet

AMPLIFIED = 8
"""Times that differences are shown: 32 of 255 levels are as bright as can be."""
QUALITY = 90
"""Of WebP: below what these pictures are to show."""
STRIP_FRAMES, STRIP_HEIGHT = 8, 72
KINDS = ("original", "made", "difference")


def shown_frames(num_frames: int) -> tuple[int, ...]:
    """Numbers of the frames that are shown whole: first, middle and last."""
    return tuple(dict.fromkeys((0, num_frames // 2, num_frames - 1)))


def difference(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| of levels, amplified, cut off at 255."""
    return ((a.int() - b.int()).abs() * AMPLIFIED).clamp(max=255).to(torch.uint8)


def save_pictures(folder: Path, levels: UInt8[Tensor, "3 T H W"], made: UInt8[Tensor, "3 T H W"]) -> None:
    """Write KIND_FRAME.webp of the shown frames, and strip.webp of clips: the clip, its reconstruction and their difference."""
    clips = dict(zip(KINDS, (levels, made, difference(levels, made)), strict=True))
    for frame in shown_frames(levels.shape[1]):
        for kind, clip in clips.items():
            _save(folder / f"{kind}_{frame}.webp", clip[:, frame])
    if levels.shape[1] > 1:
        rows = [contact_sheet(_small(clip), frames=STRIP_FRAMES) for clip in clips.values()]
        _save(folder / "strip.webp", torch.cat(rows, dim=1))


def _small(clip: Tensor) -> Tensor:
    height, width = clip.shape[-2:]
    size = (STRIP_HEIGHT, max(1, round(width * STRIP_HEIGHT / height)))
    if height <= STRIP_HEIGHT:
        return clip
    return F.interpolate(clip.transpose(0, 1).float(), size=size, mode="area").round().to(torch.uint8).transpose(0, 1)


def _save(path: Path, picture: Tensor) -> None:
    Image.fromarray(picture.permute(1, 2, 0).numpy(), "RGB").save(path, format="WEBP", quality=QUALITY, method=4)

"""Sizes a clip is brought to: a table per resolution class, the nearest aspect ratio, the longest frame count it can fill.

Tables: hpcaitech/Open-Sora opensora/datasets/aspect.py (near-equal pixel counts, multiples of 16);
landscape sizes, portrait by swapping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megasora.config.errors import UserError

SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "256px": ((256, 256), (224, 288), (208, 320), (192, 336), (176, 368), (160, 400)),
    "768px": ((768, 768), (576, 1024), (672, 880), (624, 944), (560, 1056), (544, 1088), (496, 1184)),
    "64px": ((64, 64), (48, 80), (48, 64)),
}
"""(height, width) per class; 64px is ours, for `tiny`."""


def choose_size(height: int, width: int, *, resolution: str, multiple: int) -> tuple[int, int]:
    """Size (height, width) a clip of this source size trains at.

    Args:
        resolution: a class of `SIZES`, or `manifest` for the clip's own size rounded down to `multiple`.
        multiple: pixels per token side; sizes of a class that do not divide (DC-AE) are rounded to it.

    Raises:
        UserError: unknown class, or a clip smaller than one token.
    """
    if resolution == "manifest":
        size = (height // multiple * multiple, width // multiple * multiple)
        if min(size) < multiple:
            raise UserError(f"a clip of {height}x{width} is smaller than one token ({multiple} pixels)")
        return size
    if resolution not in SIZES:
        raise UserError(f"data.resolution {resolution!r} is not one of {', '.join(SIZES)}, manifest")
    landscape = [(max(1, round(h / multiple)) * multiple, max(1, round(w / multiple)) * multiple) for h, w in SIZES[resolution]]
    sizes = landscape + [(w, h) for h, w in landscape if w != h]
    return min(sizes, key=lambda size: (abs(math.log((size[0] / size[1]) / (height / width))), size))


def pixels_of(resolution: str) -> int:
    """Pixels of a class's first size.

    Raises:
        UserError: unknown class.
    """
    if resolution not in SIZES:
        raise UserError(f"data.resolution_mix: {resolution!r} is not one of {', '.join(SIZES)}")
    height, width = SIZES[resolution][0]
    return height * width


def choose_frames(available: int, *, frame_counts: Sequence[int]) -> int:
    """Longest allowed frame count that `available` frames can fill; 0 when none can."""
    return max((count for count in frame_counts if count <= available), default=0)


def stride_to(fps: float, *, target_fps: float) -> int:
    """Smallest whole stride whose frame rate does not exceed target_fps."""
    return max(1, math.ceil(fps / target_fps - 1e-6))


def token_grid(
    num_frames: int, height: int, width: int, *, temporal_compression: int, spatial_compression: int, patch_size: int
) -> tuple[int, int, int]:
    """Video tokens along (time, height, width): the causal VAE keeps frame 0 and compresses the rest."""
    unit = spatial_compression * patch_size
    return ((num_frames - 1) // temporal_compression + 1, height // unit, width // unit)

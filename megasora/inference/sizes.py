"""Sizes by name: `768px` and `16:9` are 576 x 1024 pixels.

Source: hpcaitech/Open-Sora opensora/datasets/aspect.py (get_image_size with training=False, as utils/sampling.py asks it).
"""

from __future__ import annotations

import math

from megasora.config.errors import UserError
from megasora.data.buckets import ASPECTS, pixels_of

NAMES = tuple(dict.fromkeys(name for aspect in ASPECTS for name in (aspect, ":".join(reversed(aspect.split(":"))))))
"""Published names, width:height, each also turned."""


def size_named(resolution: str, aspect: str, *, multiple: int) -> tuple[int, int]:
    """(height, width) of a resolution and an aspect ratio: width int(sqrt(pixels w / h)), height int(pixels / width), both rounded down.

    Args:
        resolution: `256px`, `768px`, `720p`, ...
        aspect: one of NAMES, width:height.
        multiple: what both sides are multiples of (16; 32 for the DC-AE).

    Raises:
        UserError: an unknown name, or a size of no token.
    """
    pixels = pixels_of(resolution)
    if aspect not in NAMES:
        raise UserError(f"aspect {aspect!r} is not one of {', '.join(NAMES)}")
    wide, high = (float(part) for part in aspect.split(":"))
    turned = ":".join(reversed(aspect.split(":"))) in ASPECTS  # the published table puts turned twins over what stands there
    if turned:
        wide, high = high, wide
    width = int(math.sqrt(pixels * (wide / high)) // multiple) * multiple
    height = int(pixels / max(1, width) // multiple) * multiple
    if min(width, height) < multiple:
        raise UserError(f"{resolution} {aspect} is smaller than one token ({multiple} pixels); use a larger resolution")
    return (width, height) if turned else (height, width)

"""Sizes, frame counts and strides a clip is brought to: two rules.

`published` is Open-Sora's (hpcaitech/Open-Sora opensora/datasets/aspect.py and utils.py): sizes computed per resolution class, the aspect
whose height / width is nearest, whole groups of stride frames. `nearest` is ours: the same sizes, the aspect nearest in ratio, so that
portrait and landscape are treated alike, and frames at the exact stride.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal

from megasora.config.errors import UserError
from megasora.config.latent_frames import latent_frames

Rule = Literal["nearest", "published"]
ASPECTS = ("2.39:1", "2:1", "16:9", "1.85:1", "9:16", "5:8", "3:2", "4:3", "1:1")
"""width:height of the classes, in the published order, which decides ties (opensora/datasets/aspect.py, ASPECT_RATIO_LD_LIST)."""
OWN_SIZES: dict[str, tuple[tuple[int, int], ...]] = {"64px": ((64, 64), (48, 80), (48, 64))}
"""(height, width), portrait by swapping: what `nearest` takes instead of the rule's result; for `tiny`."""
LEAST_PIXELS = 0.8
"""Share of a class's pixels below which the published rule leaves a clip out (opensora/datasets/bucket.py, approx)."""
NO_FPS_CAP = 999.0
"""Rates from which on a cap is none and captions name no rate (opensora/datasets/datasets.py)."""


def pixels_of(resolution: str) -> int:
    """Pixels of a class: N x N of 'Npx', 16 / 9 N x N of 'Np' (opensora/datasets/aspect.py, get_num_pexels_from_name).

    Raises:
        UserError: it is no class.
    """
    side = resolution.removesuffix("px").removesuffix("p")
    if side.isdecimal() and side != resolution and int(side) > 0:
        return int(side) ** 2 if resolution.endswith("px") else int(int(side) ** 2 / 9 * 16)
    raise UserError(f"resolution {resolution!r} is neither pixels such as 256px nor lines such as 480p")


def height_by_width(aspect: str) -> float:
    """height / width of 'width:height'."""
    width, height = map(float, aspect.split(":"))
    return height / width


@lru_cache(maxsize=256)
def published_sizes(resolution: str, multiple: int) -> dict[str, tuple[int, int]]:
    """(height, width) of each aspect of a class, in the published order.

    As hpcaitech/Open-Sora opensora/datasets/aspect.py, get_aspect_ratios_dict, in training: width and height are rounded down to
    `multiple`, then one of them may change by one multiple if that brings the pixels nearer to the class's; a size that an earlier aspect
    has is left out. Portrait follows by swapping; where the list holds a portrait aspect itself (9:16, 5:8), the swapped size stands.

    Args:
        resolution: the class.
        multiple: pixels per token side; published: 16, or 32 for the DC-AE.

    Raises:
        UserError: no class, or one too small for tokens of that side.
    """
    pixels = pixels_of(resolution)
    sizes: dict[str, tuple[int, int]] = {}
    swapped: dict[str, tuple[int, int]] = {}
    for aspect in ASPECTS:
        wide, high = map(float, aspect.split(":"))
        width = int(math.sqrt(pixels * (wide / high)) // multiple) * multiple
        height = int((pixels / width) // multiple) * multiple if width else 0
        changes = ((-multiple, 0), (multiple, 0), (0, -multiple), (0, multiple))
        size = min(
            [(height, width), *((height + down, width + right) for down, right in changes)],
            key=lambda one: abs(one[0] * one[1] - pixels),
        )
        if min(size) < multiple:
            raise UserError(f"resolution class {resolution} is too small for tokens of {multiple} pixels")
        if size not in sizes.values():
            sizes[aspect] = size
            swapped[":".join(reversed(aspect.split(":")))] = (size[1], size[0])
    return {**sizes, **swapped}


def closest_aspect(height: float, width: float, aspects: Iterable[str]) -> str:
    """The aspect whose height / width differs least, the first of equals (opensora/datasets/aspect.py, get_closest_ratio)."""
    return min(aspects, key=lambda aspect: abs(height / width - height_by_width(aspect)))


def choose_size(height: int, width: int, *, resolution: str, multiple: int, rule: Rule = "nearest") -> tuple[int, int]:
    """Size (height, width) a clip of this source size trains at.

    Args:
        resolution: a class, or `manifest` for the clip's own size rounded down to `multiple`.
        multiple: pixels per token side.
        rule: how the aspect is chosen.

    Raises:
        UserError: unknown class, or a clip smaller than one token.
    """
    if resolution == "manifest":
        size = (height // multiple * multiple, width // multiple * multiple)
        if min(size) < multiple:
            raise UserError(f"a clip of {height}x{width} is smaller than one token ({multiple} pixels)")
        return size
    if rule == "published":
        table = published_sizes(resolution, multiple)
        return table[closest_aspect(height, width, table)]
    return min(_nearest_sizes(resolution, multiple), key=lambda size: (abs(math.log((size[0] / size[1]) / (height / width))), size))


def _nearest_sizes(resolution: str, multiple: int) -> Sequence[tuple[int, int]]:
    if resolution not in OWN_SIZES:
        return tuple(published_sizes(resolution, multiple).values())
    landscape = [(max(1, round(h / multiple)) * multiple, max(1, round(w / multiple)) * multiple) for h, w in OWN_SIZES[resolution]]
    return landscape + [(w, h) for h, w in landscape if w != h]


def choose_frames(available: int, *, frame_counts: Sequence[int], rule: Rule = "nearest") -> int:
    """Longest allowed frame count that `available` frames can fill; 0 when none can.

    The published rule takes one frame of an image alone: a clip too short for every other count is left out (opensora/datasets/bucket.py).
    """
    fitting = (count for count in frame_counts if count <= available)
    return max((count for count in fitting if rule == "nearest" or count > 1 or available == 1), default=0)


def available_frames(num_frames: int, stride: int, *, rule: Rule = "nearest") -> int:
    """Frames that a clip has at a stride; the published rule counts whole groups of `stride` (opensora/datasets/bucket.py)."""
    return num_frames // stride if rule == "published" else (num_frames - 1) // stride + 1


def frame_span(num_frames: int, stride: int, *, rule: Rule = "nearest") -> int:
    """Frames of the file that a training clip covers (published: opensora/datasets/utils.py, temporal_random_crop)."""
    return num_frames * stride if rule == "published" else (num_frames - 1) * stride + 1


def num_starts(available: int, span: int, *, rule: Rule = "nearest") -> int:
    """Places a span can begin at in a clip of `available` frames; the published rule never takes the last of several
    (opensora/datasets/video_transforms.py, TemporalRandomCrop)."""
    return max(1, available - span + (rule == "nearest"))


def stride_to(fps: float, *, target_fps: float, rule: Rule = "nearest") -> int:
    """Smallest whole stride whose frame rate does not exceed target_fps; 1 where the rate is not known (nan).

    Ours takes a rate that exceeds a multiple of the target by rounding alone (24.00001) as that multiple; the published rule
    (opensora/datasets/utils.py, map_target_fps) does not.
    """
    if math.isnan(fps):
        return 1
    return max(1, math.ceil(fps / target_fps - (1e-6 if rule == "nearest" else 0)))


def named_fps(fps: float, stride: int, *, target_fps: float) -> int | float | None:
    """Frame rate that a caption names: the file's own below the cap, else the strided one rounded down to a whole number; None when it is
    not known or there is no cap (opensora/datasets/utils.py, map_target_fps; datasets.py)."""
    if math.isnan(fps) or target_fps >= NO_FPS_CAP:
        return None
    return fps if fps < target_fps else math.floor(fps / stride)


def token_grid(
    num_frames: int,
    height: int,
    width: int,
    *,
    temporal_compression: int,
    spatial_compression: int,
    patch_size: int,
    causal: bool = True,
) -> tuple[int, int, int]:
    """Video tokens along (time, height, width)."""
    unit = spatial_compression * patch_size
    return latent_frames(num_frames, compression=temporal_compression, causal=causal), height // unit, width // unit

"""Sizes by name, against values worked out from the published rule (hpcaitech/Open-Sora opensora/datasets/aspect.py, training=False)."""

from __future__ import annotations

import pytest

from megasora.config.errors import UserError
from megasora.inference.sizes import size_named

BY_HAND = {
    # int(sqrt(65536 x 16/9) / 16) x 16 = int(341.3 / 16) x 16 = 336; 65536 / 336 = 195.05 -> 192
    ("256px", "16:9", 16): (192, 336),
    ("256px", "9:16", 16): (336, 192),
    ("256px", "1:1", 16): (256, 256),
    # sqrt(65536 x 2.39) = 395.8 -> 384; 65536 / 384 = 170.7 -> 160
    ("256px", "2.39:1", 16): (160, 384),
    ("256px", "1:2.39", 16): (384, 160),
    # sqrt(65536 x 4/3) = 295.6 -> 288; 227.6 -> 224
    ("256px", "4:3", 16): (224, 288),
    ("256px", "3:4", 16): (288, 224),
    # sqrt(589824 x 16/9) = 1024; 576
    ("768px", "16:9", 16): (576, 1024),
    ("768px", "9:16", 16): (1024, 576),
    # 5:8 is width:height: sqrt(589824 x 0.625) = 607.2 -> 592; 996.3 -> 992
    ("768px", "5:8", 16): (992, 592),
    ("768px", "8:5", 16): (592, 992),
    # sqrt(589824 x 1.85) = 1044.6 -> 1040; 567.1 -> 560
    ("768px", "1.85:1", 16): (560, 1040),
    # DC-AE: multiples of 32. sqrt(589824 x 16/9) = 1024; 576
    ("768px", "16:9", 32): (576, 1024),
    # 607.2 -> 576; 1024
    ("768px", "5:8", 32): (1024, 576),
    # 720p: 720 x 720 / 9 x 16 = 921600; 9:16 is computed and turned: sqrt(921600 x 9/16) = 720 -> 720; 1280
    ("720p", "16:9", 16): (720, 1280),
}


@pytest.mark.parametrize(("name", "size"), BY_HAND.items(), ids=lambda value: " ".join(map(str, value)))
def test_sizes(name: tuple[str, str, int], size: tuple[int, int]) -> None:
    resolution, aspect, multiple = name
    assert size_named(resolution, aspect, multiple=multiple) == size


@pytest.mark.parametrize(("resolution", "aspect", "words"), [("256", "1:1", "256px"), ("256px", "5:4", "16:9"), ("8px", "1:1", "larger")])
def test_unknown_names_are_refused_with_the_known_ones(resolution: str, aspect: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        size_named(resolution, aspect, multiple=16)

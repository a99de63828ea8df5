"""Operations of encoding and decoding are those counted of the authors' classes (FlopCounterMode on the meta device)."""

from __future__ import annotations

import pytest
import torch

from megasora.config.errors import UserError
from megasora.config.schema import EncodersConfig
from megasora.models.autoencoders.choice import blank_autoencoder
from megasora.models.autoencoders.cost import AutoencoderCost
from megasora.models.encoders.bundle import be_quiet

WHOLE = {"tile_size": 0, "tile_frames": 0}
TILED = {"tile_size": 256, "tile_frames": 32}
DC_AE = {"spatial_compression": 32, "causal": False}


def cost(**settings: object) -> AutoencoderCost:
    be_quiet()
    autoencoder = blank_autoencoder(EncodersConfig(**settings), dtype=torch.bfloat16)  # type: ignore[arg-type]
    assert autoencoder is not None
    return AutoencoderCost(autoencoder)


@pytest.mark.parametrize(
    ("settings", "frames", "side", "encode", "decode"),
    [
        (WHOLE, 1, 256, 0.85, 1.44),
        (WHOLE, 32, 256, 26.25, 45.36),
        (WHOLE, 128, 256, 105.0, 181.4),
        (TILED, 128, 256, 137.8, 238.1),
        (WHOLE, 128, 768, 945.0, 1632.8),
        (TILED, 128, 768, 1938, 3349),
    ],
)
def test_dc_ae(settings: dict[str, int], frames: int, side: int, encode: float, decode: float) -> None:
    counted = cost(**settings, **DC_AE)
    assert counted.encode(num_frames=frames, height=side, width=side) / 1e12 == pytest.approx(encode, rel=0.005)
    assert counted.decode(num_frames=frames, height=side, width=side) / 1e12 == pytest.approx(decode, rel=0.005)


@pytest.mark.parametrize(("tile", "side", "encode", "decode"), [(0, 256, 79.2, 145.3), (256, 768, 1111, 2041)])
def test_hunyuan(tile: int, side: int, encode: float, decode: float) -> None:
    counted = cost(tile_size=tile)
    assert counted.encode(num_frames=129, height=side, width=side) / 1e12 == pytest.approx(encode, rel=0.005)
    assert counted.decode(num_frames=129, height=side, width=side) / 1e12 == pytest.approx(decode, rel=0.005)


def test_a_clip_it_does_not_take_costs_nothing_that_could_be_said() -> None:
    with pytest.raises(UserError, match="takes clips of 1 or 4k from 8 on frames, not 33; use 32"):
        cost(**DC_AE).encode(num_frames=33, height=256, width=256)

"""Clips of an autoencoder that is not causal are cut in time, too: windows outside, tiles within, blended as published."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megasora.config.dc_ae import DCAEConfig
from megasora.models.autoencoders.autoencoder import Autoencoder
from megasora.models.autoencoders.dc_ae.model import VideoDCAE
from megasora.models.autoencoders.dc_ae.network import DCAENetwork
from megasora.models.autoencoders.tiling import Cut, Steps, Tiling, tile_sizes
from tests.pool import RankPool
from tests.unit.models.autoencoders.test_dc_ae import noise

SMALL = DCAEConfig(
    widths=(4, 4, 8),
    encoder_depths=(1, 1, 1),
    decoder_depths=(1, 1, 1),
    attention_from=2,
    temporal_stages=(0, 1),
    latent_channels=4,
    head_dim=4,
)
"""4x4x4 compression."""
TILING = Tiling(size=16, overlap=0.25, frames=16)
"""Tiles of 4x4 latent pixels, windows of 4 latent frames: strides of 12 pixels and frames, blends of 1 latent and 4 pixels or frames."""
Lengths = tuple[int, int]


def tiny() -> DCAENetwork:
    torch.manual_seed(0)
    module = VideoDCAE(SMALL).requires_grad_(False)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return DCAENetwork(module)


def blended(a: Tensor, b: Tensor, extent: int, axis: int) -> Tensor:
    """b with its first lines going over from a's last (blend_t, blend_v, blend_h of dc_ae.py)."""
    a, b = a.movedim(axis, 0), b.movedim(axis, 0)
    extent = min(len(a), len(b), extent)
    for line in range(extent):
        b[line] = a[len(a) - extent + line] * (1 - line / extent) + b[line] * (line / extent)
    return b.movedim(0, axis)


def in_space(whole: Tensor, through: Callable[[Tensor], Tensor], before: int, after: int) -> Tensor:
    """spatial_tiled_encode and spatial_tiled_decode, with an overlap of a quarter."""
    stride, extent = before * 3 // 4, after // 4
    rows = [
        [through(whole[..., y : y + before, x : x + before]).clone() for x in range(0, whole.shape[-1], stride)]
        for y in range(0, whole.shape[-2], stride)
    ]
    result = []
    for i, row in enumerate(rows):
        line = []
        for j, tile in enumerate(row):
            if i > 0:
                tile = blended(rows[i - 1][j], tile, extent, -2)
            if j > 0:
                tile = blended(row[j - 1], tile, extent, -1)
            line.append(tile[..., : after - extent, : after - extent])
        result.append(torch.cat(line, dim=-1))
    return torch.cat(result, dim=-2)


def published(whole: Tensor, through: Callable[[Tensor], Tensor], *, space: Lengths, time: Lengths) -> Tensor:
    """encode and decode of dc_ae.py: (length before, length after) of tiles and windows."""

    def window(part: Tensor) -> Tensor:
        return in_space(part, through, *space) if max(part.shape[-2:]) > space[0] else through(part).clone()

    before, after = time
    if whole.shape[-3] <= before:
        return window(whole)
    extent = after // 4
    row = [window(whole[..., start : start + before, :, :]) for start in range(0, whole.shape[-3], before * 3 // 4)]
    for first, second in zip(row[:-1], row[1:], strict=True):
        blended(first, second, extent, -3)
    return torch.cat([part[..., : after - extent, :, :] for part in row], dim=-3)


@pytest.mark.parametrize(("frames", "height", "width"), [(8, 20, 16), (20, 4, 8), (24, 20, 28), (32, 8, 4), (44, 12, 20)], ids=str)
def test_tiles_and_windows_are_blended_as_published(frames: int, height: int, width: int) -> None:
    network = tiny()
    ours = Autoencoder(network, tiling=TILING)
    clip = noise(3, frames, height, width)
    latent = published(clip[None], network.moments, space=(16, 4), time=(16, 4))[0]
    found = ours.posterior(clip)
    torch.testing.assert_close(found.mean, latent, rtol=1e-6, atol=1e-6)
    assert not found.std.any()
    pixels = published(latent[None], network.pixels, space=(4, 16), time=(4, 16))[0]
    torch.testing.assert_close(ours.decode(latent), pixels, rtol=1e-6, atol=1e-6)
    assert pixels.shape == clip.shape
    whole = Autoencoder(network, tiling=None).posterior(clip).mean
    assert float((whole - latent).abs().max()) > 1e-3 * float(whole.abs().max())  # it did cut


@pytest.mark.parametrize("frames", [28, 52])
def test_a_last_latent_frame_alone_keeps_its_four_frames(frames: int) -> None:
    # 7 and 13 latent frames: the published walk ends with a window of one, which is decoded to one frame (28 frames become 25)
    network = tiny()
    ours = Autoencoder(network, tiling=TILING)
    latent = noise(4, frames // 4, 2, 2)
    assert published(latent[None], network.pixels, space=(4, 16), time=(4, 16)).shape[2] == frames - 3
    video = ours.decode(latent)
    assert video is not None
    assert video.shape == (3, frames, 8, 8)
    # all but the last three frames but for the last blend are as published
    torch.testing.assert_close(
        video[:, : frames - 4], published(latent[None], network.pixels, space=(4, 16), time=(4, 16))[0][:, : frames - 4]
    )


@pytest.mark.parametrize("size", [(16, 16, 12), (1, 16, 16), (8, 4, 8)], ids=str)
def test_what_no_tile_cuts_goes_through_whole(size: tuple[int, int, int]) -> None:
    network = tiny()
    clip = noise(3, *size)
    cut, whole = Autoencoder(network, tiling=TILING), Autoencoder(network, tiling=None)
    latent = whole.encode(clip)
    assert torch.equal(cut.encode(clip), latent)
    restored = cut.decode(latent)
    assert restored is not None and torch.equal(restored, whole.decode(latent))  # type: ignore[arg-type]
    assert restored.shape == clip.shape


def test_sizes_of_the_96_tiles_of_a_long_clip() -> None:
    # 768px, 128 frames: windows at 0, 24, ..., 120 and tiles at 0, 192, 384, 576
    cut = Cut(space=Steps(before=256, after=8, overlap=0.25), time=Steps(before=32, after=8, overlap=0.25))
    sizes = tile_sizes((128, 768, 768), cut)
    assert sizes.total() == 96
    assert sizes[(32, 256, 256)] == 5 * 9 and sizes[(8, 192, 192)] == 1
    assert tile_sizes((32, 24, 24), cut.inverse()).total() == 96


def decoded_on_ranks(rank: int, size: tuple[int, int, int], to: int) -> tuple[Tensor | None, Tensor | None]:
    autoencoder = Autoencoder(tiny(), tiling=TILING)
    latent = noise(4, *size)
    alone = autoencoder.decode(latent)
    return autoencoder.decode(latent, group=dist.group.WORLD, to=to), alone


@pytest.mark.parametrize(("size", "to"), [((7, 5, 4), 0), ((6, 1, 1), 1), ((3, 5, 7), 1)], ids=str)
def test_ranks_share_out_windows_and_tiles(pool: RankPool, size: tuple[int, int, int], to: int) -> None:
    for rank, (shared, alone) in enumerate(pool.run(2, decoded_on_ranks, size, to)):
        if rank == to:
            assert alone is not None and shared is not None
            assert torch.equal(shared, alone)
        else:
            assert shared is None

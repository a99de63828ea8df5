"""The autoencoder takes a clip whole in time and in overlapping tiles in space, blended as published."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from megasora.models.autoencoders.autoencoder import Autoencoder
from megasora.models.autoencoders.hunyuan import HunyuanNetwork
from megasora.models.autoencoders.tiling import Cut, Steps, Tiling, tiled
from tests.pool import RankPool


def tiny_vae(**changes: object) -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(0)
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, scaling_factor=0.5, **changes
    ).eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("frames", [33, 65])
def test_a_clip_is_encoded_and_decoded_in_one_call_of_the_networks(frames: int) -> None:
    vae = tiny_vae()
    ours = Autoencoder(HunyuanNetwork(vae), tiling=Tiling(size=256, overlap=0.25))
    clip = noise(3, frames, 16, 24)
    with torch.no_grad():
        mean = vae.quant_conv(vae.encoder(clip[None]))[0].chunk(2)[0]
        decoded = vae.decoder(vae.post_quant_conv(mean[None]))[0]
        framewise = vae.encode(clip[None]).latent_dist.mean[0]  # what diffusers does when it is asked: 17-frame tiles
    torch.testing.assert_close(ours.encode(clip), mean * 0.5, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(mean * 0.5), decoded, rtol=1e-5, atol=1e-5)
    assert float((framewise - mean).abs().max()) > 1e-2


def published(whole: Tensor, through: object, *, before: int, after: int) -> Tensor:
    """The published walk over tiles with overlap 1/4, line by line (autoencoder_kl_causal_3d.py, spatial_tiled_encode)."""
    stride, extent = before * 3 // 4, after // 4
    grid = [
        [through(whole[..., y : y + before, x : x + before]) for x in range(0, whole.shape[-1], stride)]  # type: ignore[operator]
        for y in range(0, whole.shape[-2], stride)
    ]
    for i, row in enumerate(grid):
        for j, tile in enumerate(row):
            if i > 0:
                above = grid[i - 1][j]
                for line in range(min(extent, above.shape[-2], tile.shape[-2])):
                    share = line / min(extent, above.shape[-2], tile.shape[-2])
                    tile[..., line, :] = (
                        above[..., line - min(extent, above.shape[-2], tile.shape[-2]), :] * (1 - share) + tile[..., line, :] * share
                    )
            if j > 0:
                left = row[j - 1]
                for line in range(min(extent, left.shape[-1], tile.shape[-1])):
                    share = line / min(extent, left.shape[-1], tile.shape[-1])
                    tile[..., line] = left[..., line - min(extent, left.shape[-1], tile.shape[-1])] * (1 - share) + tile[..., line] * share
    limit = after - extent
    return torch.cat([torch.cat([tile[..., :limit, :limit] for tile in row], -1) for row in grid], -2)


@pytest.mark.parametrize("size", [(80, 48), (56, 112), (48, 32)])
def test_tiles_are_blended_as_published(size: tuple[int, int]) -> None:
    vae = tiny_vae()
    ours = Autoencoder(HunyuanNetwork(vae), tiling=Tiling(size=32, overlap=0.25))
    clip = noise(3, 5, *size)
    with torch.no_grad():
        moments = published(clip[None], lambda tile: vae.quant_conv(vae.encoder(tile)), before=32, after=4)[0]
        mean, log_variance = moments.chunk(2)
        pixels = published(mean[None], lambda tile: vae.decoder(vae.post_quant_conv(tile)), before=4, after=32)[0]
    posterior = ours.posterior(clip)
    assert posterior.mean.shape == (4, 2, size[0] // 8, size[1] // 8)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(posterior.std, torch.exp(log_variance / 2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.decode(mean * 0.5), pixels, rtol=1e-6, atol=1e-6)
    whole = Autoencoder(HunyuanNetwork(vae), tiling=None).posterior(clip).mean
    assert float((whole - mean).abs().max()) > 1e-3  # it did cut


def test_tiles_agree_with_diffusers_own_at_the_published_size() -> None:
    vae = tiny_vae()
    clip = noise(3, 1, 448, 264)
    ours = Autoencoder(HunyuanNetwork(vae), tiling=Tiling(size=256, overlap=0.25)).encode(clip)
    vae.use_framewise_encoding = False
    vae.enable_tiling()  # its defaults: 256 pixels, stride 192
    with torch.no_grad():
        theirs = vae.encode(clip[None]).latent_dist.mean[0] * 0.5
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_picture_of_one_tile_is_not_cut() -> None:
    vae = tiny_vae()
    clip = noise(3, 1, 32, 32)
    assert torch.equal(
        Autoencoder(HunyuanNetwork(vae), tiling=Tiling(size=32, overlap=0.25)).encode(clip),
        Autoencoder(HunyuanNetwork(vae), tiling=None).encode(clip),
    )


def test_each_line_of_an_overlap_goes_over_linearly() -> None:
    # tiles of 8 at 0 and 6 that hold their corner's x: over the overlap of 2 the first's 0 goes to the second's 6 in steps of 1/2
    whole = torch.arange(12.0).expand(1, 1, 8, 12)
    steps = Steps(before=8, after=8, overlap=0.25)
    made = tiled(whole, lambda tile: tile[..., :1].expand_as(tile).clone(), cut=Cut(space=steps))
    assert made is not None
    assert made[0, 0, 0].tolist() == [0.0] * 6 + [0.0, 3.0] + [6.0] * 4


def decoded_on_ranks(rank: int, size: tuple[int, int], to: int) -> tuple[Tensor | None, Tensor | None]:
    vae = Autoencoder(HunyuanNetwork(tiny_vae()), tiling=Tiling(size=32, overlap=0.25))
    latent = noise(4, 3, *size)
    alone = vae.decode(latent)
    return vae.decode(latent, group=dist.group.WORLD, to=to), alone


@pytest.mark.parametrize(("ranks", "size", "to"), [(2, (8, 10), 0), (3, (6, 7), 1), (4, (5, 3), 3)])
def test_ranks_share_out_the_tiles_and_one_gets_the_bits_of_one_rank(pool: RankPool, ranks: int, size: tuple[int, int], to: int) -> None:
    results = pool.run(ranks, decoded_on_ranks, size, to)
    for rank, (shared, alone) in enumerate(results):
        if rank == to:
            assert alone is not None and shared is not None
            assert torch.equal(shared, alone)
        else:
            assert shared is None

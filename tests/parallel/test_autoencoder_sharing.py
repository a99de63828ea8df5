"""What the ranks of a group make of a clip together is what one of them makes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megasora.config.schema import Sharing, SlabAxis
from megasora.models.autoencoders.autoencoder import Autoencoder, Network
from megasora.models.autoencoders.hunyuan import HunyuanNetwork
from megasora.models.autoencoders.tiling import Tiling
from tests.parallel.test_autoencoder_slabs import distance, drawn, network
from tests.pool import RankFailedError, RankPool
from tests.unit.models.autoencoders.test_tiling import tiny_vae

SIZES = {"dc_ae": (3, 16, 32, 96), "hunyuan": (3, 5, 16, 24)}
TILES = {"dc_ae": Tiling(size=64, overlap=0.0, frames=8), "hunyuan": Tiling(size=16, overlap=0.5)}


def autoencoder(name: str, *, cut: bool, **sharing: Any) -> Autoencoder:
    """A small one; the clip of SIZES is cut into four or two tiles, or not at all."""
    made: Network = network(torch.float32) if name == "dc_ae" else HunyuanNetwork(tiny_vae())
    return Autoencoder(made, tiling=TILES[name] if cut else None, **sharing)


def both_ways_on_rank(rank: int, name: str, cut: bool, sharing: Sharing, axis: SlabAxis) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean, deviation and pixels by all ranks together; the last one gets the pixels."""
    ours, group = autoencoder(name, cut=cut, sharing=sharing, axis=axis), dist.group.WORLD
    posterior = ours.posterior(drawn(*SIZES[name], dtype=torch.float32), group=group)
    return posterior.mean, posterior.std, ours.decode(posterior.mean * ours.scaling_factor, group=group, to=dist.get_world_size() - 1)


@pytest.mark.parametrize(
    ("name", "cut", "sharing", "axis"),
    [
        ("dc_ae", True, "none", "time"),
        ("dc_ae", True, "tiles", "time"),
        ("dc_ae", False, "tiles", "time"),
        ("dc_ae", True, "slabs", "time"),
        ("dc_ae", True, "slabs", "height"),
        ("dc_ae", False, "slabs", "time"),
        ("hunyuan", True, "tiles", "time"),
        ("hunyuan", True, "slabs", "height"),
    ],
)
def test_every_way_to_share(pool: RankPool, name: str, cut: bool, sharing: Sharing, axis: SlabAxis) -> None:
    ((mean, std, video),) = pool.run(1, both_ways_on_rank, name, cut, "none", "time")
    results = pool.run(2, both_ways_on_rank, name, cut, sharing, axis)
    assert results[0][2] is None
    bound = 1e-5 if sharing == "slabs" else 0.0
    for ours in results:
        assert distance(ours[0], mean) <= bound and distance(ours[1] + 1, std + 1) <= bound
    assert distance(results[1][2], video) <= bound


def test_slabs_of_time_of_a_causal_network_are_refused(pool: RankPool) -> None:
    with pytest.raises(RankFailedError, match=r"AutoencoderKLHunyuanVideo is not split in time .*; use --encoders.parallel_axis height"):
        pool.run(2, both_ways_on_rank, "hunyuan", True, "slabs", "time")

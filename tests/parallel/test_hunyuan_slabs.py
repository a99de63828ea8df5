"""HunyuanVideo's network in slabs of height: latents, pixels and gradients are those of diffusers' class on one rank."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megasora.models.autoencoders.autoencoder import Network
from megasora.models.autoencoders.hunyuan import HunyuanNetwork
from tests.parallel.test_autoencoder_slabs import Clip, distance, drawn, loss_of
from tests.pool import RankPool
from tests.unit.models.autoencoders.test_tiling import tiny_vae

CASES: list[tuple[int, Clip]] = [(2, (5, 24, 16)), (3, (9, 32, 16)), (3, (1, 16, 16)), (4, (5, 40, 8))]
IDS = [f"{ranks} ranks, {'x'.join(map(str, clip))}" for ranks, clip in CASES]


def network(dtype: torch.dtype) -> HunyuanNetwork:
    module = tiny_vae().to(dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:  # where they count
                parameter.add_(drawn(*parameter.shape, dtype=dtype), alpha=0.3)
    return HunyuanNetwork(module)


def both_ways(ours: Network, clip: Clip) -> tuple[Tensor, Tensor]:
    """Moments of a clip and pixels of a latent of its size."""
    latent = drawn(1, *ours.facts.latent_shape(*clip), dtype=torch.float32)
    with torch.no_grad():
        return ours.moments(drawn(1, 3, *clip, dtype=torch.float32)), ours.pixels(latent)


def both_ways_on_rank(rank: int, clip: Clip) -> tuple[Tensor, Tensor]:
    return both_ways(network(torch.float32).in_slabs(dist.group.WORLD, axis="height"), clip)


@pytest.mark.parametrize(("ranks", "clip"), CASES, ids=IDS)
def test_latents_and_pixels_are_those_of_one_rank(pool: RankPool, ranks: int, clip: Clip) -> None:
    moments, pixels = both_ways(network(torch.float32), clip)
    for ours, video in pool.run(ranks, both_ways_on_rank, clip):
        assert ours.shape == moments.shape and distance(ours, moments) <= 1e-5
        assert video.shape == pixels.shape and distance(video, pixels) <= 1e-5


def gradients(module: Any) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@cache
def gradients_of_one(clip: Clip) -> dict[str, Tensor]:
    whole = network(torch.float64)
    given = drawn(1, 3, *clip, dtype=torch.float64)
    moments = whole.moments(given)
    loss_of(whole.pixels(moments[:, :4]), given, moments).backward()
    return gradients(whole.module)


def gradients_on_rank(rank: int, clip: Clip) -> dict[str, Tensor]:
    ours = network(torch.float64)
    slabbed = ours.in_slabs(dist.group.WORLD, axis="height")
    way = slabbed.clip(num_frames=clip[0], height=clip[1], width=clip[2])
    own = way.split(drawn(1, 3, *clip, dtype=torch.float64))
    moments = way.encode(own)
    loss_of(way.decode(moments[:, :4]), own, moments).backward()
    slabbed.sum_gradients()
    return gradients(ours.module)


@pytest.mark.parametrize(("ranks", "clip"), CASES, ids=IDS)
def test_every_gradient_is_that_of_one_rank(pool: RankPool, ranks: int, clip: Clip) -> None:
    expected = gradients_of_one(clip)
    largest = max(float(grad.norm()) for grad in expected.values())
    for found in pool.run(ranks, gradients_on_rank, clip):
        for name, grad in expected.items():
            # a key's bias shifts all scores alike: its gradient is zero but for rounding
            assert float((found[name] - grad).norm()) <= 1e-10 * max(float(grad.norm()), 1e-6 * largest), name

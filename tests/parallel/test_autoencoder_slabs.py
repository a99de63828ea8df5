"""One clip over several ranks, in slabs of time or of height: latents, pixels and gradients are one rank's."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megasora.config.dc_ae import TINY, DCAEConfig
from megasora.config.schema import SlabAxis
from megasora.models.autoencoders.dc_ae.model import VideoDCAE
from megasora.models.autoencoders.dc_ae.network import DCAENetwork
from megasora.models.autoencoders.dc_ae.traffic import slab_traffic
from megasora.models.autoencoders.slabs import halo_lines
from megasora.parallel.slabs import Lines, even_shares, halo_of
from tests.parallel.test_traffic import CountBytes
from tests.pool import RankPool

Clip = tuple[int, int, int]
CONFIG = replace(TINY, widths=(4, 4, 8, 8, 8, 8), head_dim=4, latent_channels=4)
CASES: list[tuple[int, SlabAxis, Clip]] = [
    (2, "time", (8, 32, 32)),  # one latent frame each: thinner than the 5x5x5 kernel's reach
    (3, "time", (28, 32, 64)),  # 3, 2, 2 latent frames
    (4, "time", (12, 32, 32)),  # the last rank has none
    (2, "height", (8, 96, 32)),  # 2 rows and 1 row
    (3, "height", (8, 96, 32)),  # one row each: two neighbours on a side
    (4, "height", (8, 160, 32)),
    (2, "time", (1, 64, 32)),  # a picture: all on rank 0
    (3, "height", (1, 64, 32)),
]
IDS = [f"{ranks} ranks, {axis} of {'x'.join(map(str, clip))}" for ranks, axis, clip in CASES]


def network(dtype: torch.dtype, *, recompute: bool = False) -> DCAENetwork:
    """Random weights that let every part count: norms of about 1, convolutions that keep the size of things."""
    torch.manual_seed(0)
    module = VideoDCAE(CONFIG, recompute="stages" if recompute else "none")
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.3, 0.3)
            else:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5)
    return DCAENetwork(module.to(dtype))


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def both_ways_on_rank(rank: int, axis: SlabAxis, clip: Clip) -> tuple[Tensor, Tensor]:
    slabbed = network(torch.float32).in_slabs(dist.group.WORLD, axis=axis)
    with torch.no_grad():
        latent = slabbed.moments(drawn(1, 3, *clip, dtype=torch.float32))
        return latent, slabbed.pixels(latent)


@pytest.mark.parametrize(("ranks", "axis", "clip"), CASES, ids=IDS)
def test_latents_and_pixels_are_those_of_one_rank(pool: RankPool, ranks: int, axis: SlabAxis, clip: Clip) -> None:
    whole = network(torch.float32)
    with torch.no_grad():
        latent = whole.moments(drawn(1, 3, *clip, dtype=torch.float32))
        pixels = whole.pixels(latent)
    for ours, video in pool.run(ranks, both_ways_on_rank, axis, clip):
        assert ours.shape == latent.shape and distance(ours, latent) <= 1e-5
        assert video.shape == pixels.shape and distance(video, pixels) <= 1e-5


def loss_of(pixels: Tensor, clip: Tensor, latent: Tensor) -> Tensor:
    """Sums over places, so that slabs' shares add up."""
    return (pixels - clip).square().sum() + latent.pow(4).sum()


def gradients(module: VideoDCAE) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


@cache
def gradients_of_one(clip: Clip) -> tuple[float, dict[str, Tensor]]:
    module = network(torch.float64).module
    given = drawn(1, 3, *clip, dtype=torch.float64)
    restored, latent = module(given)
    loss = loss_of(restored, given, latent)
    loss.backward()
    return float(loss), gradients(module)


def gradients_on_rank(rank: int, axis: SlabAxis, clip: Clip, gathered: bool, recompute: bool) -> tuple[float, dict[str, Tensor]]:
    """A training step's gradients: of a loss of the gathered clip, the same on every rank, or of every slab's own share."""
    ours = network(torch.float64, recompute=recompute)
    slabbed = ours.in_slabs(dist.group.WORLD, axis=axis)
    given = drawn(1, 3, *clip, dtype=torch.float64)
    way = slabbed.clip(num_frames=clip[0], height=clip[1], width=clip[2])
    own = way.split(given)
    latent = way.encode(own)
    restored = way.decode(latent)
    if gathered:
        loss = loss_of(way.gather(restored), given, way.gather(latent))
    else:
        loss = loss_of(restored, own, latent)
    loss.backward()
    slabbed.sum_gradients()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / (dist.get_world_size() if gathered else 1), gradients(ours.module)


@pytest.mark.parametrize(("ranks", "axis", "clip"), CASES, ids=IDS)
def test_every_gradient_is_that_of_one_rank(pool: RankPool, ranks: int, axis: SlabAxis, clip: Clip) -> None:
    loss, expected = gradients_of_one(clip)
    gathered = ranks % 2 == 1
    for ours, found in pool.run(ranks, gradients_on_rank, axis, clip, gathered, ranks == 4):
        assert ours == pytest.approx(loss, rel=1e-12)
        assert found.keys() == expected.keys()
        assert max(distance(found[name], grad) for name, grad in expected.items()) <= 1e-10


def test_shares_are_even_and_the_first_ranks_have_more() -> None:
    assert even_shares(7, 3) == (3, 2, 2)
    assert even_shares(2, 4) == (1, 1, 0, 0)


def test_a_thin_slab_takes_from_further_neighbours() -> None:
    halo = halo_of((1, 1, 1, 0), 2, before=2, after=2)
    assert halo.takes == (Lines(peer=0, start=0, count=1), Lines(peer=1, start=1, count=1))
    assert halo.gives == (Lines(peer=0, start=0, count=1), Lines(peer=1, start=0, count=1))
    assert halo_of((1, 1, 1, 0), 3, before=2, after=2).takes == ()


def test_what_one_takes_another_gives() -> None:
    lengths = (4, 1, 3, 1)
    halos = [halo_of(lengths, rank, before=2, after=1) for rank in range(4)]
    taken = Counter((lines.peer, rank, lines.count) for rank, halo in enumerate(halos) for lines in halo.takes)
    given = Counter((rank, lines.peer, lines.count) for rank, halo in enumerate(halos) for lines in halo.gives)
    assert taken == given


def test_a_stride_reads_nothing_behind() -> None:
    assert halo_lines(8, kernel=3, stride=1) == (1, 1)
    assert halo_lines(8, kernel=3, stride=2) == (1, 0)
    assert halo_lines(8, kernel=5, stride=1) == (2, 2)
    assert halo_lines(1, kernel=3, stride=2) == (1, 1)  # a single frame
    assert halo_lines(8, kernel=1, stride=1) == (0, 0)


def traffic_on_rank(rank: int, axis: SlabAxis, clip: Clip) -> list[tuple[int, int, int]]:
    """(bytes sent, messages, bytes summed) of encoding, of decoding and of both with their backward pass."""
    ours = network(torch.float32)
    slabbed = ours.in_slabs(dist.group.WORLD, axis=axis)
    way = slabbed.clip(num_frames=clip[0], height=clip[1], width=clip[2])
    own = way.split(drawn(1, 3, *clip, dtype=torch.float32)).requires_grad_()
    found: list[tuple[int, int, int]] = []

    def note(counter: CountBytes) -> None:
        found.append((counter.bytes["send"], counter.calls["send"], counter.bytes["allreduce_"]))

    with CountBytes() as counter:
        latent = way.encode(own)
    note(counter)
    with CountBytes() as counter:
        pixels = way.decode(latent)
    note(counter)
    with CountBytes() as counter:
        pixels.sum().backward()
    note(counter)
    return found


@pytest.mark.parametrize(("ranks", "axis", "clip"), [case for case in CASES if case[0] < 4], ids=IDS[:2] + IDS[3:5] + IDS[6:])
def test_bytes_are_those_of_the_formula(pool: RankPool, ranks: int, axis: SlabAxis, clip: Clip) -> None:
    encode, decode = (slab_traffic(CONFIG, way, clip, ranks=ranks, axis=axis, itemsize=4) for way in ("encode", "decode"))  # type: ignore[arg-type]
    for rank, counted in enumerate(pool.run(ranks, traffic_on_rank, axis, clip)):
        expected = [(made[rank].halo_bytes, made[rank].messages, made[rank].sum_bytes) for made in (encode, decode)]
        assert counted[:2] == expected
    # backward, each rank sends what it received, so bytes agree over all ranks
    both = [sum(getattr(one, name) for made in (encode, decode) for one in made) for name in ("halo_bytes", "messages", "sum_bytes")]
    counted = pool.run(ranks, traffic_on_rank, axis, clip)
    assert [sum(rank[2][place] for rank in counted) for place in range(3)] == both


def test_bytes_of_the_published_sizes() -> None:
    """Measured of the authors' class at 768px and 128 frames, bf16, split on height: 2.5 GB encoding, 3.0 GB decoding, of an inner rank."""
    clip = (128, 768, 768)
    encode, decode = (slab_traffic(DCAEConfig(), way, clip, ranks=4, axis="height", itemsize=2)[1] for way in ("encode", "decode"))  # type: ignore[arg-type]
    assert encode.halo_bytes == pytest.approx(2.5e9, rel=0.05) and decode.halo_bytes == pytest.approx(3.0e9, rel=0.01)
    assert encode.sum_bytes == decode.sum_bytes == pytest.approx(2.0e6, rel=0.02)

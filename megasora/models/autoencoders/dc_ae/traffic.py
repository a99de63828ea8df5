"""Bytes that a rank sends for one clip through the video DC-AE in slabs, as a formula; a test counts the real ones.

Each convolution of kernel k gives every neighbour within k // 2 lines the lines it reads, of all channels of its input: an inner rank sends
(k - 1) lines where the stride is 1 and (k - 1) / 2 where it is 2. The rows of a line are the clip's other two lengths at that layer. Each
LiteMLA adds one sum of (K + 1) K numbers per head over the group. The backward pass sends as much again, the same way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megasora.config.dc_ae import DCAEConfig
from megasora.config.schema import SlabAxis
from megasora.models.autoencoders.dc_ae.attention import AGGREGATION_KERNEL
from megasora.models.autoencoders.dc_ae.blocks import EXPANSION
from megasora.models.autoencoders.slabs import AXES, halo_lines
from megasora.models.autoencoders.surroundings import Lengths
from megasora.parallel.slabs import even_shares, halo_of

SUM_BYTES = 4
"""Of a number that is summed over ranks; half the digits would lose it (`Slabs.total`)."""


@dataclass(frozen=True, kw_only=True)
class SlabTraffic:
    """Payload of one rank for one clip, one way through one half of the network."""

    halo_bytes: int
    """Lines sent to neighbours."""
    messages: int
    """In how many messages."""
    sum_bytes: int
    """Of the tensors that are summed over the group."""
    sums: int
    """How many of them."""


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A convolution as its halo sees it."""

    channels: int
    kernel: int
    stride: Lengths
    grid: Lengths
    """Frames, rows and columns of the whole clip at its input."""


def slab_traffic(
    config: DCAEConfig, way: Literal["encode", "decode"], clip: Lengths, *, ranks: int, axis: SlabAxis, itemsize: int
) -> list[SlabTraffic]:
    """What each rank sends.

    Args:
        config: sizes of the network.
        way: which half.
        clip: frames, height and width in pixels, of a clip that it takes.
        ranks: of the group.
        axis: what slabs are of.
        itemsize: bytes of a number.
    """
    place = AXES.index(axis)
    grids = _grids(config, clip)
    units = even_shares(grids[-1][place], ranks)
    halo, messages = [0] * ranks, [0] * ranks
    for layer in _encoder(config, grids) if way == "encode" else _decoder(config, grids):
        per_unit = layer.grid[place] // grids[-1][place]
        lengths = tuple(count * per_unit for count in units)
        before, after = halo_lines(lengths[0], kernel=layer.kernel, stride=layer.stride[place])
        line = layer.channels * layer.grid[0] * layer.grid[1] * layer.grid[2] // layer.grid[place] * itemsize
        for rank in range(ranks):
            gives = halo_of(lengths, rank, before=before, after=after).gives
            halo[rank] += line * sum(lines.count for lines in gives)
            messages[rank] += len(gives)
    depths = config.encoder_depths if way == "encode" else config.decoder_depths
    attentions = [width for width, depth in list(zip(config.widths, depths, strict=True))[config.attention_from :] for _ in range(depth)]
    state = SUM_BYTES * sum(2 * width * (config.head_dim + 1) for width in attentions)  # 2 width / K heads of (K + 1) K
    return [SlabTraffic(halo_bytes=halo[rank], messages=messages[rank], sum_bytes=state, sums=len(attentions)) for rank in range(ranks)]


def _grids(config: DCAEConfig, clip: Lengths) -> list[Lengths]:
    """The clip's lengths at each stage, pixels first."""
    grids = [clip]
    for stage in range(len(config.widths) - 1):
        frames, height, width = grids[-1]
        in_time = 2 if config.halves_time(stage) and clip[0] != 1 else 1
        grids.append((frames // in_time, height // 2, width // 2))
    return grids


def _blocks(config: DCAEConfig, grids: list[Lengths], *, stage: int, depth: int) -> Iterator[_Layer]:
    """Convolutions of a stage that reach beyond one place."""
    width = config.widths[stage]
    kernels = [(width, 3), (width, 3)]
    if stage >= config.attention_from:
        kernels = [(3 * width, AGGREGATION_KERNEL), (2 * EXPANSION * width, 3)]
    for channels, kernel in kernels * depth:
        yield _Layer(channels=channels, kernel=kernel, stride=(1, 1, 1), grid=grids[stage])


def _encoder(config: DCAEConfig, grids: list[Lengths]) -> Iterator[_Layer]:
    plain = (1, 1, 1)
    yield _Layer(channels=3, kernel=3, stride=plain, grid=grids[0])
    for stage, depth in enumerate(config.encoder_depths):
        yield from _blocks(config, grids, stage=stage, depth=depth)
        if stage + 1 < len(grids):
            stride = (2 if config.halves_time(stage) else 1, 2, 2)
            yield _Layer(channels=config.widths[stage], kernel=3, stride=stride, grid=grids[stage])
    yield _Layer(channels=config.widths[-1], kernel=3, stride=plain, grid=grids[-1])


def _decoder(config: DCAEConfig, grids: list[Lengths]) -> Iterator[_Layer]:
    plain = (1, 1, 1)
    yield _Layer(channels=config.latent_channels, kernel=3, stride=plain, grid=grids[-1])
    for stage, depth in enumerate(config.decoder_depths):
        if stage + 1 < len(grids):
            yield _Layer(channels=config.widths[stage + 1], kernel=3, stride=plain, grid=grids[stage])
        yield from _blocks(config, grids, stage=stage, depth=depth)
    yield _Layer(channels=config.widths[0], kernel=3, stride=plain, grid=grids[0])

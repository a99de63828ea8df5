"""Floating-point operations of encoding and decoding a clip, tiles included: counted once per size of tile on the meta device.

Two per multiply-add, of convolutions and matrix products alone, which are nearly all. Attention counts as torch composes it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megasora.models.autoencoders.autoencoder import Autoencoder
from megasora.models.autoencoders.tiling import Cut, tile_sizes

Lengths = tuple[int, int, int]


class AutoencoderCost:
    """Operations for clips of any size; each size of tile is counted when it comes first.

    Args:
        autoencoder: on the meta device (`choice.blank_autoencoder`).
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder
        self._known: dict[tuple[str, Lengths], int] = {}

    def encode(self, *, num_frames: int, height: int, width: int) -> int:
        """FLOPs to encode a clip of this size in pixels.

        Raises:
            UserError: a size that the autoencoder does not take.
        """
        self._autoencoder.facts.refuse(num_frames, height, width)
        cut = self._autoencoder.cut(num_frames, height, width)
        return self._sum("encode", self._autoencoder.network.moments, 3, (num_frames, height, width), cut)

    def decode(self, *, num_frames: int, height: int, width: int) -> int:
        """FLOPs to decode a clip of this size in pixels.

        Raises:
            UserError: a size that the autoencoder does not take.
        """
        facts = self._autoencoder.facts
        facts.refuse(num_frames, height, width)
        channels, *lengths = facts.latent_shape(num_frames, height, width)
        cut = self._autoencoder.cut(num_frames, height, width)
        network = self._autoencoder.network
        return self._sum("decode", network.pixels, channels, (lengths[0], lengths[1], lengths[2]), cut and cut.inverse())

    def _sum(self, way: str, through: Callable[[Tensor], Tensor], channels: int, lengths: Lengths, cut: Cut | None) -> int:
        return sum(count * self._of_tile(way, through, channels, tile) for tile, count in tile_sizes(lengths, cut).items())

    def _of_tile(self, way: str, through: Callable[[Tensor], Tensor], channels: int, tile: Lengths) -> int:
        if (way, tile) not in self._known:
            given = torch.empty(1, channels, *tile, dtype=self._autoencoder.dtype, device="meta")
            with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
                through(given)
            self._known[way, tile] = counter.get_total_flops()
        return self._known[way, tile]

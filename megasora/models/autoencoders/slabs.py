"""An autoencoder's network with one clip over the ranks of a group, in slabs of time or of height: equal to one rank up to rounding.

For networks whose layers ask their `Surroundings` (the video DC-AE's) or are walked through (HunyuanVideo's, `hunyuan_slabs.py`). Slabs are
cut on whole latent frames or rows, uneven where they do not divide; a rank without any takes part on zeros that nobody reads.
`SlabbedNetwork` is a `Network` (whole clips in, whole latents out, on every rank); `SlabbedNetwork.clip` gives what training an autoencoder
needs, slabs in and slabs out, with gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from megasora.config.schema import SlabAxis
from megasora.models.autoencoders.autoencoder import AutoencoderFacts, Network
from megasora.models.autoencoders.posterior import Posterior
from megasora.models.autoencoders.surroundings import Lengths
from megasora.parallel.cuts import Cut
from megasora.parallel.slabs import Slabs, even_shares

AXES: tuple[SlabAxis, ...] = ("time", "height")
"""By their place among the last three dimensions."""


class InSlab:
    """See `Surroundings`: neighbours' lines, sums and the number of frames come from the group."""

    def __init__(self, slabs: Slabs) -> None:
        self.slabs = slabs

    def reached(self, x: Tensor, *, kernel: Lengths, stride: Lengths) -> tuple[Tensor, Lengths]:
        """See `Surroundings.reached`: along the slabs' axis nothing is left to add."""
        axis, padding = 3 + self.slabs.dim, [side // 2 for side in kernel]
        before, after = halo_lines(x.shape[self.slabs.dim], kernel=kernel[axis], stride=stride[axis])
        padding[axis] = 0
        return self.slabs.with_halo(x, before=before, after=after), (padding[0], padding[1], padding[2])

    def total(self, sums: Tensor) -> Tensor:
        """See `Surroundings.total`."""
        return self.slabs.total(sums)

    def num_frames(self, x: Tensor) -> int:
        """See `Surroundings.num_frames`."""
        return self.slabs.num_lines(x) if AXES[3 + self.slabs.dim] == "time" else x.shape[2]

    def place(self, x: Tensor) -> tuple[Lengths, Lengths]:
        """See `Surroundings.place`."""
        first, sides, axis = [0, 0, 0], list(x.shape[2:]), 3 + self.slabs.dim
        first[axis], sides[axis] = self.slabs.first_line(x), self.slabs.num_lines(x)
        return (first[0], first[1], first[2]), (sides[0], sides[1], sides[2])


Through = Callable[[Tensor, InSlab], Tensor]


def halo_lines(length: int, *, kernel: int, stride: int) -> tuple[int, int]:
    """Lines before and after a slab that a convolution reads, with zeros of half the kernel on both sides of the whole.

    Slabs are multiples of the stride, or the whole is a single line. With stride 2 nothing after the slab is read.
    """
    last = (-(-length // stride) - 1) * stride  # the line in the middle of the last kernel
    return kernel // 2, last + kernel // 2 + 1 - length


def through_slab(through: Through, slab: Tensor, *, slabs: Slabs, lines: int) -> Tensor:
    """A network on this rank's slab; a slab without lines goes through as one unit of zeros of which nothing is taken.

    Args:
        through: the network, which asks its surroundings.
        slab: of its input.
        slabs: how the clip is cut.
        lines: of the input per unit.
    """
    dim = slabs.dim
    if slabs.own:
        return through(slab, InSlab(slabs))
    shape = list(slab.shape)
    shape[dim] = lines
    return through(torch.cat([slab, slab.new_zeros(shape)], dim=dim), InSlab(slabs)).narrow(dim, 0, 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipSlabs:
    """One clip's way through a network in slabs, with gradients: after `backward`, call `SlabbedNetwork.sum_gradients`.

    A rank's slab may have no lines (fewer latent lines than ranks); losses over it are sums, not means.
    """

    slabs: Slabs
    moments_of: Through
    pixels_of: Through
    compression: int
    """Lines of pixels per line of the latent along the slabs' axis; 1 for a single frame."""

    def split(self, whole: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B C t h w"]:
        """This rank's slab of a clip or of a latent that every rank has."""
        return self.slabs.split(whole)

    def gather(self, slab: Float[Tensor, "B C t h w"]) -> Float[Tensor, "B C T H W"]:
        """The whole clip or latent on every rank. In its backward each rank keeps its own slab's part of the gradient, so every rank must
        compute the same loss from it."""
        return self.slabs.gather(slab)

    def encode(self, pixels: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B M t h w"]:
        """Moments of this rank's slab."""
        return self._through(self.moments_of, pixels, lines=self.compression)

    def decode(self, z: Float[Tensor, "B C t h w"]) -> Float[Tensor, "B 3 T H W"]:
        """Pixels of this rank's slab of a latent that is not scaled."""
        return self._through(self.pixels_of, z, lines=1)

    def cut(self, *, of_pixels: bool) -> Cut:
        """Lines of every rank, of the latent or of the pixels."""
        lines = self.compression if of_pixels else 1
        return Cut(dim=self.slabs.dim, lengths=tuple(units * lines for units in self.slabs.units))

    def _through(self, through: Through, slab: Tensor, *, lines: int) -> Tensor:
        return through_slab(through, slab, slabs=self.slabs, lines=lines)


class SlabbedNetwork:
    """See `autoencoder.Network`; made by its `in_slabs`. All ranks of the group make the same calls, with the same clip.

    Args:
        network: the whole one; its weights are used, not copied, and must be the same on every rank.
        moments, pixels: its ways, with surroundings.
        group: ranks of a clip.
        axis: what is cut.
    """

    def __init__(self, network: Network, *, moments: Through, pixels: Through, group: dist.ProcessGroup, axis: SlabAxis) -> None:
        self.network, self.group, self.axis = network, group, axis
        self._ways = moments, pixels
        # NCCL: all ranks must take part in a group's first exchange, and some may have no neighbours (torch.distributed.batch_isend_irecv)
        device = next(network.module.parameters()).device
        dist.all_reduce(torch.zeros(1, device=device), group=group)

    @property
    def facts(self) -> AutoencoderFacts:
        """See `Network.facts`."""
        return self.network.facts

    @property
    def module(self) -> nn.Module:
        """See `Network.module`."""
        return self.network.module

    def clip(self, *, num_frames: int, height: int, width: int) -> ClipSlabs:
        """The way of a clip of this size in frames and pixels.

        Raises:
            UserError: a size that the autoencoder does not take.
        """
        self.facts.refuse(num_frames, height, width)
        return self._way(self.facts.latent_shape(num_frames, height, width)[1:], one_frame=num_frames == 1)

    def in_slabs(self, group: dist.ProcessGroup, *, axis: SlabAxis) -> Network:
        """See `Network.in_slabs`: of the whole network."""
        return self.network.in_slabs(group, axis=axis)

    def _way(self, latent: tuple[int, ...], *, one_frame: bool) -> ClipSlabs:
        """Of a clip or tile whose latent has this many frames, rows and columns."""
        place, facts = AXES.index(self.axis), self.facts
        slabs = Slabs(group=self.group, dim=place - 3, units=even_shares(latent[place], self.group.size()))
        compression = (1 if one_frame else facts.temporal_compression, facts.spatial_compression)[place]
        moments, pixels = self._ways
        return ClipSlabs(slabs=slabs, moments_of=moments, pixels_of=pixels, compression=compression)

    def sum_gradients(self) -> None:
        """Add every parameter's gradient over the group (those of ranks without one count as zeros): the gradient of one rank."""
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=self.group)

    def moments(self, pixels: Float[Tensor, "1 3 T H W"]) -> Float[Tensor, "1 M t h w"]:
        """See `Network.moments`: the whole clip's, on every rank."""
        frames, height, width = pixels.shape[-3:]
        way = self._way(self.facts.latent_shape(frames, height, width)[1:], one_frame=frames == 1)
        return way.gather(way.encode(way.split(pixels)))

    def posterior(self, moments: Float[Tensor, "1 M t h w"]) -> Posterior:
        """See `Network.posterior`."""
        return self.network.posterior(moments)

    def pixels(self, z: Float[Tensor, "1 C t h w"]) -> Float[Tensor, "1 3 T H W"]:
        """See `Network.pixels`: the whole clip's, on every rank."""
        way = self._way(tuple(z.shape[-3:]), one_frame=z.shape[-3] == 1)
        return way.gather(way.decode(way.split(z)))

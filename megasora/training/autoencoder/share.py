"""What one rank has of a clip that the ranks of a group train on together: its slab, its frames, its patches.

The autoencoder works on slabs of height (or of time). LPIPS looks at whole frames, so slabs of height are cut anew into runs of frames; the
discriminator's slabs are cut in the lines that one of its patches stands for. Every loss is a sum over what a rank has, divided by what the
clip has, so that losses and gradients of the ranks add up to the clip's: each is counted once, and the sum over data-parallel and
context-parallel ranks that ends a step is the only one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from jaxtyping import Float, UInt8
from torch import Tensor

from megasora.config.errors import UserError
from megasora.data.decoding.contract import normalise
from megasora.models.autoencoders.discriminator import ClipDiscriminator
from megasora.models.autoencoders.posterior import Posterior, numbered
from megasora.models.autoencoders.slabs import AXES, ClipSlabs, through_slab
from megasora.parallel.cuts import Cut, recut
from megasora.parallel.slabs import Slabs, even_shares


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipShare:
    """This rank's part of one clip; all of it where the clip is not shared."""

    num_frames: int
    height: int
    width: int
    slabs: ClipSlabs | None
    """Its way through the autoencoder; None where the clip is not shared."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Ranks that share the clip."""
        return None if self.slabs is None else self.slabs.slabs.group

    @property
    def rank(self) -> int:
        """Within the group."""
        return 0 if self.slabs is None else self.slabs.slabs.rank

    @property
    def ranks(self) -> int:
        """Of the group."""
        return 1 if self.group is None else self.group.size()

    @property
    def elements(self) -> int:
        """Numbers of the clip."""
        return 3 * self.num_frames * self.height * self.width

    @property
    def slab(self) -> Cut:
        """How pixels lie in the autoencoder."""
        return Cut(dim=-3, lengths=(self.num_frames,)) if self.slabs is None else self.slabs.cut(of_pixels=True)

    @property
    def frames(self) -> Cut:
        """Whole frames of every rank: those of its slab, where slabs are of time."""
        cut = self.slab
        return cut if cut.dim == -3 else Cut(dim=-3, lengths=even_shares(self.num_frames, self.ranks))

    def patches(self, discriminator: ClipDiscriminator) -> Cut:
        """How pixels lie in the discriminator.

        Raises:
            UserError: the clip is no whole number of patches along its slabs.
        """
        cut = self.slab
        if self.slabs is None:
            return cut
        lines, unit = sum(cut.lengths), self._unit(discriminator)
        if lines % unit:
            what = AXES[3 + cut.dim]
            raise UserError(
                f"a clip of {self.num_frames} x {self.height} x {self.width} in slabs of {what} is no whole number of the discriminator's "
                f"patches of {unit}; use another size, fewer --discriminator.num_layers, or --parallel.context_parallel_size 1"
            )
        return Cut(dim=cut.dim, lengths=tuple(units * unit for units in even_shares(lines // unit, self.ranks)))

    def pixels(self, levels: UInt8[Tensor, "3 T H W"], cut: Cut) -> Float[Tensor, "3 t h w"]:
        """This rank's part by a cut, in [-1, 1], of the levels that every rank of the group has."""
        return normalise(cut.of(levels, self.rank))

    def moved(self, part: Tensor, *, source: Cut, target: Cut) -> Tensor:
        """A part by one cut from the parts by another; all ranks of the group call it together."""
        return part if self.group is None else recut(part, source=source, target=target, group=self.group)

    def whole(self, part: Float[Tensor, "3 t h w"]) -> Float[Tensor, "3 T H W"]:
        """The clip on every rank of the group, from their slabs; not differentiated."""
        return part if self.slabs is None else self.slabs.gather(part)

    def logits(self, discriminator: ClipDiscriminator, part: Float[Tensor, "3 t h w"], *, key: int) -> Tensor:
        """Of this rank's patches."""
        clip = part[None].to(discriminator.out.weight.dtype)
        if self.slabs is None:
            made: Tensor = discriminator(clip, key=key)
            return made
        cut, unit = self.patches(discriminator), self._unit(discriminator)
        slabs = Slabs(group=self.slabs.slabs.group, dim=cut.dim, units=tuple(lines // unit for lines in cut.lengths))
        return through_slab(lambda x, slab: discriminator(x, slab, key=key), clip, slabs=slabs, lines=unit)

    def num_patches(self, discriminator: ClipDiscriminator) -> int:
        """Of the whole clip."""
        count = 1
        for side, unit in zip((self.num_frames, self.height, self.width), discriminator.units, strict=True):
            count *= -(-side // unit)  # each halving rounds up
        return count

    def sample(self, posterior: Posterior, *, shape: tuple[int, ...], key: int) -> Tensor:
        """This rank's part of the sample that a clip's whole latent [C, t, h, w] has."""
        elements = numbered(shape, device=posterior.mean.device)
        return posterior.sample_at(elements if self.slabs is None else self.slabs.split(elements), key=key)

    def total(self, sums: Tensor) -> Tensor:
        """Added over the group, in fp32 at least; not differentiated."""
        if self.group is None:
            return sums
        wide = sums.float() if sums.element_size() < 4 else sums.clone()
        dist.all_reduce(wide, group=self.group)
        return wide

    def _unit(self, discriminator: ClipDiscriminator) -> int:
        return discriminator.units[3 + self.slab.dim]

"""Slabs: one clip spread over the ranks of a group along one dimension, each rank with a run of neighbouring lines.

What a layer cannot know from its own slab comes by three exchanges, each with its backward: neighbours' lines that a kernel reaches
(`with_halo`; its backward adds gradients of those lines where they came from), sums over all places (`total`; the gradient is summed, too)
and the whole (`gather`; each rank takes the gradient of its own lines). So with the same loss on every rank of what was gathered, or with
shares of it that each rank sums over its own slab, the parameter gradients summed over the group are those of one rank.

Sizes are never sent: slabs are cut in units, the lines that one line of the coarsest layer stands for, and a layer's lines per unit are
the same on every rank. A slab may be thinner than a kernel's reach (further neighbours send, too) or empty: such a rank works on one
unit of zeros that nobody reads, to take part in every exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A run of lines that two ranks exchange."""

    peer: int
    """The other rank, within the group."""
    start: int
    """First line: within the sender's slab where it is given, within the receiver's slab with its halo where it is taken."""
    count: int


@dataclass(frozen=True, kw_only=True)
class Halo:
    """What one rank exchanges for one layer."""

    before: int
    after: int
    takes: tuple[Lines, ...]
    gives: tuple[Lines, ...]


def even_shares(units: int, ranks: int) -> tuple[int, ...]:
    """Units of each rank, in order; the first ranks have one more where they do not divide, the last ones none where there are too few."""
    return tuple(units // ranks + (rank < units % ranks) for rank in range(ranks))


def halo_of(lengths: Sequence[int], rank: int, *, before: int, after: int) -> Halo:
    """Lines that a rank takes from and gives to others, so that each has `before` lines ahead of its slab and `after` behind it.

    Beyond the ends of the whole there are none. Empty slabs take and give nothing.

    Args:
        lengths: lines of every rank.
        rank: the one asked for.
        before, after: lines that a kernel reaches beyond a slab.
    """
    ends = list(accumulate(lengths))
    slabs = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]

    def common(owner: int, taker: int) -> tuple[int, int]:
        """First and last + 1 of the owner's lines that the taker reads."""
        (first, last), (start, end) = slabs[owner], slabs[taker]
        if owner == taker or start == end:
            return 0, 0
        return max(first, start - before), min(last, end + after)

    own = slabs[rank][0]
    takes = [(peer, *common(peer, rank)) for peer in range(len(lengths))]
    gives = [(peer, *common(rank, peer)) for peer in range(len(lengths))]
    return Halo(
        before=before,
        after=after,
        takes=tuple(Lines(peer=peer, start=start - own + before, count=stop - start) for peer, start, stop in takes if stop > start),
        gives=tuple(Lines(peer=peer, start=start - own, count=stop - start) for peer, start, stop in gives if stop > start),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Slabs:
    """How one clip is cut over a group.

    Args:
        group: the ranks, in the order of their slabs. Its first exchange of all must be one that all ranks take part in (NCCL).
        dim: of the tensors, counted from the end.
        units: of each rank.
    """

    group: dist.ProcessGroup
    dim: int
    units: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Within the group."""
        return int(self.group.rank())

    @property
    def own(self) -> int:
        """Units of this rank."""
        return self.units[self.rank]

    def lengths(self, slab: Tensor) -> tuple[int, ...]:
        """Lines of every rank at the layer whose tensor this rank's `slab` is; an empty slab is held as one unit."""
        per_unit = slab.shape[self.dim] // max(1, self.own)
        return tuple(units * per_unit for units in self.units)

    def num_lines(self, slab: Tensor) -> int:
        """Lines of the whole at the layer whose tensor this rank's slab is."""
        return sum(self.lengths(slab))

    def first_line(self, slab: Tensor) -> int:
        """Where this rank's slab begins in the whole, at the layer whose tensor it is."""
        return sum(self.lengths(slab)[: self.rank])

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first line of the whole."""
        return self.own > 0 and not any(self.units[: self.rank])

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last line of the whole."""
        return self.own > 0 and not any(self.units[self.rank + 1 :])

    def split(self, whole: Tensor) -> Tensor:
        """This rank's slab, which may have no lines. Its gradient is zero elsewhere."""
        per_unit, rest = divmod(whole.shape[self.dim], sum(self.units))
        assert rest == 0, f"{whole.shape[self.dim]} lines are no multiple of {sum(self.units)} units"
        return whole.narrow(self.dim, per_unit * sum(self.units[: self.rank]), per_unit * self.own)

    def gather(self, slab: Tensor) -> Tensor:
        """The whole on every rank, from slabs that may have no lines; `split`'s inverse, backward too."""
        made: Tensor = _Gather.apply(slab, self)  # type: ignore[no-untyped-call]
        return made

    def gather_for_all(self, slab: Tensor) -> Tensor:
        """The whole on every rank, for each to compute something else of it: gradients are summed over the ranks. An empty slab is held as
        one unit of which nothing is taken."""
        lines = slab.narrow(self.dim, 0, self.lengths(slab)[self.rank])
        made: Tensor = _Summed.apply(self.gather(lines), self)  # type: ignore[no-untyped-call]
        return made

    def with_halo(self, slab: Tensor, *, before: int, after: int) -> Tensor:
        """The slab with neighbours' lines around it, and zeros beyond the ends of the whole."""
        if before == after == 0:
            return slab
        made: Tensor = _WithHalo.apply(slab, self, before, after)  # type: ignore[no-untyped-call]
        return made

    def total(self, sums: Tensor) -> Tensor:
        """Sums over all ranks, added in fp32 where the input has half the digits."""
        wide = sums.float() if sums.dtype in (torch.bfloat16, torch.float16) else sums
        made: Tensor = _Total.apply(wide, self)  # type: ignore[no-untyped-call]
        return made.to(sums.dtype)


class _WithHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, slab: Tensor, slabs: Slabs, before: int, after: int) -> Tensor:  # type: ignore[override]
        dim, length = slabs.dim, slab.shape[slabs.dim]
        halo = halo_of(slabs.lengths(slab), slabs.rank, before=before, after=after)
        ctx.slabs, ctx.halo = slabs, halo  # type: ignore[attr-defined]
        shape = list(slab.shape)
        shape[dim] = before + length + after
        padded = slab.new_zeros(shape)
        padded.narrow(dim, before, length).copy_(slab)
        given = [(lines.peer, slab.narrow(dim, lines.start, lines.count)) for lines in halo.gives]
        places = [padded.narrow(dim, lines.start, lines.count) for lines in halo.takes]
        arrived = exchange(given, [(lines.peer, place) for lines, place in zip(halo.takes, places, strict=True)], slabs.group)
        for place, lines in zip(places, arrived, strict=True):
            place.copy_(lines)
        return padded

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        slabs, halo = ctx.slabs, ctx.halo  # type: ignore[attr-defined]
        dim = slabs.dim
        own = grad.narrow(dim, halo.before, grad.shape[dim] - halo.before - halo.after).clone()
        given = [(lines.peer, grad.narrow(dim, lines.start, lines.count)) for lines in halo.takes]
        places = [own.narrow(dim, lines.start, lines.count) for lines in halo.gives]
        arrived = exchange(given, [(lines.peer, place) for lines, place in zip(halo.gives, places, strict=True)], slabs.group)
        for place, lines in zip(places, arrived, strict=True):
            place.add_(lines)
        return own, None, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, sums: Tensor, slabs: Slabs) -> Tensor:  # type: ignore[override]
        ctx.slabs = slabs  # type: ignore[attr-defined]
        return _added(sums if slabs.own else torch.zeros_like(sums), slabs.group)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        slabs = ctx.slabs  # type: ignore[attr-defined]
        total = _added(grad, slabs.group)
        return (total if slabs.own else torch.zeros_like(total)), None


class _Summed(torch.autograd.Function):
    """The same tensor; in the backward, the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, whole: Tensor, slabs: Slabs) -> Tensor:  # type: ignore[override]
        ctx.slabs = slabs  # type: ignore[attr-defined]
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        slabs = ctx.slabs  # type: ignore[attr-defined]
        return _added(grad if slabs.own else torch.zeros_like(grad), slabs.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, slab: Tensor, slabs: Slabs) -> Tensor:  # type: ignore[override]
        ctx.slabs = slabs  # type: ignore[attr-defined]
        dim, most = slabs.dim, max(slabs.units)
        # an empty slab does not tell the lines of a unit; every rank of the group must send as many
        per_unit = slab.shape[dim] // slabs.own if slabs.own else 0
        if 0 in slabs.units:
            known = torch.tensor(per_unit, device=slab.device)
            dist.all_reduce(known, op=dist.ReduceOp.MAX, group=slabs.group)
            per_unit = int(known)
        widened = F.pad(slab.movedim(dim, -1), (0, most * per_unit - slab.shape[dim])).movedim(-1, dim).contiguous()
        parts = [torch.empty_like(widened) for _ in slabs.units]
        dist.all_gather(parts, widened, group=slabs.group)
        return torch.cat([part.narrow(dim, 0, units * per_unit) for part, units in zip(parts, slabs.units, strict=True)], dim=dim)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.slabs.split(grad), None  # type: ignore[attr-defined]


def _added(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = sums.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def exchange(given: Sequence[tuple[int, Tensor]], places: Sequence[tuple[int, Tensor]], group: dist.ProcessGroup) -> list[Tensor]:
    """Send lines to peers and receive others of the shapes of `places` from theirs."""
    arrived = [torch.empty(place.shape, dtype=place.dtype, device=place.device) for _, place in places]
    operations: list[Any] = [dist.P2POp(dist.isend, lines.contiguous(), dist.get_global_rank(group, peer), group) for peer, lines in given]
    for (peer, _), target in zip(places, arrived, strict=True):
        operations.append(dist.P2POp(dist.irecv, target, dist.get_global_rank(group, peer), group))
    if operations:
        for handle in dist.batch_isend_irecv(operations):
            handle.wait()
    return arrived

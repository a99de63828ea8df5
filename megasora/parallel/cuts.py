"""Cutting a tensor that is spread over a group anew: rows that one rank has become whole frames, or slabs of other lengths.

For what is computed of slabs and not in them: a loss that needs whole frames, a network whose coarsest line stands for more pixels. Every
rank sends each other one only what that one lacks. Nothing here is differentiated: the gradient of what was cut anew is cut back.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor

from megasora.parallel.slabs import exchange


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Which run of lines of a tensor each rank of a group has; together they are the whole."""

    dim: int
    """Counted from the end."""
    lengths: tuple[int, ...]
    """Of every rank, in order; some may be 0."""

    def lines(self, rank: int) -> tuple[int, int]:
        """First and last + 1 of a rank's."""
        end = list(accumulate(self.lengths))[rank]
        return end - self.lengths[rank], end

    def of(self, whole: Tensor, rank: int) -> Tensor:
        """A rank's part of what every rank has."""
        start, stop = self.lines(rank)
        return whole.narrow(self.dim, start, stop - start)


def recut(own: Tensor, *, source: Cut, target: Cut, group: dist.ProcessGroup) -> Tensor:
    """What this rank has of a tensor by `target`, from what all ranks have of it by `source`; all of them call it together.

    Args:
        own: this rank's part by `source`, also where it has no lines.
        source, target: along the same dimension or two different ones, of the same whole.
        group: the ranks, in the order of the cuts.
    """
    if source == target:
        return own
    rank = int(group.rank())
    shape = list(own.shape)
    shape[source.dim] = sum(source.lengths)
    shape[target.dim] = target.lengths[rank]
    made = own.new_empty(shape)
    given = [(peer, _common(own, source, target, held=source, sender=rank, receiver=peer)) for peer in range(group.size())]
    taken = [(peer, _common(made, source, target, held=target, sender=peer, receiver=rank)) for peer in range(group.size())]
    mine, place = given[rank][1], taken[rank][1]
    if mine is not None and place is not None:
        place.copy_(mine)
    sent = [(peer, part) for peer, part in given if part is not None and peer != rank]
    places = [(peer, part) for peer, part in taken if part is not None and peer != rank]
    for (_, part), arrived in zip(places, exchange(sent, places, group), strict=True):
        part.copy_(arrived)
    return made


def _common(part: Tensor, source: Cut, target: Cut, *, held: Cut, sender: int, receiver: int) -> Tensor | None:
    """Of what the sender has by `source`, or the receiver by `target` (`held`), the lines that the one sends the other; None for none."""
    first, second = source.lines(sender), target.lines(receiver)
    if source.dim == target.dim:
        runs = {source.dim: (max(first[0], second[0]), min(first[1], second[1]))}
    else:
        runs = {source.dim: first, target.dim: second}
    offset = first[0] if held is source else second[0]
    for dim, (start, stop) in runs.items():
        if stop <= start:
            return None
        part = part.narrow(dim, start - (offset if dim == held.dim else 0), stop - start)
    return part

"""Time of a collective by where its ranks stand: rings inside NVLink domains, rails across them.

A group of n ranks, k of them in each domain (as many network cards serve it there), payload B bytes as `perf.collectives` counts it:

    all-gather, reduce-scatter   (n - 1) / n B through the slowest link of the ring
    all-reduce                   twice that
    all-to-all                   what goes to other domains through each rank's own card, the rest beside it inside
    send                         B through one link

Across domains a ring enters and leaves a domain once per card, so its rate is k cards' or the inner link's, whichever is less (NCCL's rings
and rails; busbw of nccl-tests). A step of a ring costs its link's latency; between domains log2 of their number (trees), which NCCL chooses
for small messages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megasora.perf.hardware import Hardware, Link

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How the ranks of a group stand."""

    size: int
    """Ranks."""
    per_domain: int
    """Most of them in one domain of the inner link."""

    @property
    def domains(self) -> int:
        """Domains they are spread over."""
        return -(-self.size // self.per_domain)


@lru_cache(maxsize=65536)
def placement_of(*, size: int, stride: int, domain: int) -> Placement:
    """Of a group whose ranks stand `stride` apart in the world, the first of them at a domain's start.

    Args:
        size: ranks of the group.
        stride: distance of neighbours in world ranks.
        domain: ranks that an inner link joins; 0 means all.
    """
    if domain == 0 or size == 1:
        return Placement(size=size, per_domain=size)
    return Placement(size=size, per_domain=max(1, min(size, domain // stride)))


def collective_s(kind: Kind, size_bytes: float, *, placement: Placement, hardware: Hardware) -> float:
    """Seconds of one collective of `size_bytes` payload on every rank; 0 for a group of one."""
    n = placement.size
    if n == 1:
        return 0.0
    inner, outer = hardware.links[0], hardware.links[-1]
    if kind == "send":
        link = inner if placement.per_domain > 1 else outer
        return link.latency_s + size_bytes / link.bytes_per_s
    latency = _latency_s(placement, inner, outer)
    if kind == "all_to_all":
        inside = size_bytes * (placement.per_domain - 1) / n / inner.bytes_per_s
        across = size_bytes * (n - placement.per_domain) / n / outer.bytes_per_s
        return latency + max(inside, across)
    rate = inner.bytes_per_s if placement.domains == 1 else min(inner.bytes_per_s, outer.bytes_per_s * placement.per_domain)
    once = size_bytes * (n - 1) / n / rate
    return 2 * (latency + once) if kind == "all_reduce" else latency + once


def _latency_s(placement: Placement, inner: Link, outer: Link) -> float:
    inside = (placement.per_domain - 1) * inner.latency_s
    return inside + math.ceil(math.log2(placement.domains)) * outer.latency_s if placement.domains > 1 else inside

"""Overlapping tiles in space: each goes through the autoencoder alone, and neighbours are blended linearly over the overlap.

Source: hpcaitech/Open-Sora opensora/models/hunyuan_vae/autoencoder_kl_causal_3d.py (spatial_tiled_encode, spatial_tiled_decode, blend_v,
blend_h). A tile that has been blended is what the next one is blended with, so the order (rows from above, each from the left) matters.

With a group the tiles are dealt out over its ranks, and one of them blends: the bits are those of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megasora.config.schema import EncodersConfig


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Square tiles of `size` pixels that overlap by the share `overlap` of their side."""

    size: int
    overlap: float

    @classmethod
    def of(cls, config: EncodersConfig) -> Tiling | None:
        """The tiling of a run's settings; None when tile_size is 0."""
        return cls(size=config.tile_size, overlap=config.tile_overlap) if config.tile_size else None

    def cuts(self, height: int, width: int) -> bool:
        """Whether a picture of this many pixels is cut: any side longer than a tile."""
        return max(height, width) > self.size


def tiled(
    whole: Tensor,
    through: Callable[[Tensor], Tensor],
    *,
    tile: tuple[int, int],
    overlap: float,
    group: dist.ProcessGroup | None = None,
    to: int = 0,
) -> Tensor | None:
    """What `through` makes of a picture or clip, tile by tile.

    Args:
        whole: [..., H, W], on every rank of the group.
        through: one tile [..., h, w] -> [..., h r, w r], r the ratio of the two sides of `tile`.
        tile: side of a tile before and after `through`.
        overlap: share of a tile's side that it has in common with the next.
        group: ranks that share out the tiles; None computes all here.
        to: rank within the group that gets the result; the others get None.
    """
    before, after = tile
    stride, extent = int(before * (1 - overlap)), int(after * overlap)
    rows, columns = (range(0, length, stride) for length in whole.shape[-2:])
    corners = [(y, x) for y in rows for x in columns]
    size, rank = (1, 0) if group is None else (group.size(), (group.rank() - to) % group.size())
    own: Iterator[Tensor] = (through(whole[..., y : y + before, x : x + before]) for y, x in corners[rank::size])
    if group is not None and size > 1:
        sides = [tuple(min(before, length - at) * after // before for length, at in zip(whole.shape[-2:], c, strict=True)) for c in corners]
        collected = _collect(list(own), sides, group=group, to=to)
        if collected is None:
            return None
        own = iter(collected)
    return _joined([[next(own) for _ in columns] for _ in rows], extent=extent, limit=after - extent)


def _collect(own: list[Tensor], sides: list[tuple[int, ...]], *, group: dist.ProcessGroup, to: int) -> list[Tensor] | None:
    """All tiles in order on rank `to`, whose own are numbers 0, size, 2 size, ...; None on the others, which send theirs in order."""
    receiver = dist.get_global_rank(group, to)
    if group.rank() != to:
        contiguous = [part.contiguous() for part in own]
        for request in [dist.isend(part, receiver, group=group) for part in contiguous]:
            assert request is not None
            request.wait()
        return None
    parts: list[Tensor] = []
    for number, side in enumerate(sides):
        if number % group.size() == 0:
            parts.append(own[number // group.size()])
            continue
        part = torch.empty((*own[0].shape[:-2], *side), dtype=own[0].dtype, device=own[0].device)
        dist.recv(part, dist.get_global_rank(group, (to + number) % group.size()), group=group)
        parts.append(part)
    return parts


def _joined(tiles: list[list[Tensor]], *, extent: int, limit: int) -> Tensor:
    """Tiles blended with the one above and the one to the left, cut to `limit` and put together."""
    rows: list[Tensor] = []
    for i, row in enumerate(tiles):
        for j, part in enumerate(row):
            if i > 0:
                _blend(tiles[i - 1][j], part, dim=-2, extent=extent)
            if j > 0:
                _blend(row[j - 1], part, dim=-1, extent=extent)
        rows.append(torch.cat([part[..., :limit, :limit] for part in row], dim=-1))
    return torch.cat(rows, dim=-2)


def _blend(before: Tensor, after: Tensor, *, dim: int, extent: int) -> None:
    """Let the first lines of `after` go over from the last ones of `before`: line y is before (1 - y / extent) + after y / extent."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    if extent == 0:
        return
    share = torch.arange(extent, dtype=torch.float64, device=after.device) / extent
    share = share.to(torch.promote_types(after.dtype, torch.float32)).view(-1, *([1] * (-1 - dim)))
    lines = after.narrow(dim, 0, extent)
    lines.copy_(before.narrow(dim, before.shape[dim] - extent, extent) * (1 - share) + lines * share)

"""Overlapping tiles: each goes through the autoencoder alone, and neighbours are blended linearly over the overlap.

In space: hpcaitech/Open-Sora opensora/models/hunyuan_vae/autoencoder_kl_causal_3d.py (spatial_tiled_encode, spatial_tiled_decode, blend_v,
blend_h). In time, with tiles in space within: opensora/models/dc_ae/models/dc_ae.py (temporal_tiled_encode, temporal_tiled_decode).
A tile that has been blended is what the next one is blended with, so the order (rows from above, each from the left) matters.

With a group the tiles are dealt out over its ranks, and one of them blends: the bits are those of one rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megasora.config.schema import EncodersConfig


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How one axis is cut."""

    before: int
    """Length of a tile before it goes through the autoencoder."""
    after: int
    """Length of what comes out."""
    overlap: float
    """Share of a tile that it has in common with the next."""
    shortest: int = 1
    """A last tile shorter than this is left out: the one before covers its places."""

    @property
    def extent(self) -> int:
        """Lines over which neighbours are blended."""
        return int(self.after * self.overlap)

    @property
    def limit(self) -> int:
        """Lines that are kept of a tile with one after it."""
        return self.after - self.extent

    def starts(self, length: int) -> list[int]:
        """First lines of the tiles of an axis."""
        starts = list(range(0, length, int(self.before * (1 - self.overlap))))
        if len(starts) > 1 and length - starts[-1] < self.shortest:
            starts.pop()
        return starts

    def made_of(self, length: int, start: int) -> int:
        """Length of what comes out of a tile."""
        return min(self.before, length - start) * self.after // self.before


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a clip is cut on its way through the autoencoder; an axis that is not cut goes through whole."""

    space: Steps | None
    time: Steps | None = None

    def inverse(self) -> Cut:
        """The same tiles on the way back. No window is a single latent frame, which would come back as a picture: as published, 52 frames
        come back as 49."""
        space, time = self.space, self.time
        return Cut(
            space=space and replace(space, before=space.after, after=space.before),
            time=time and replace(time, before=time.after, after=time.before, shortest=2),
        )


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Square tiles of `size` pixels and windows of `frames` frames that overlap by the share `overlap` of their length; 0 does not cut."""

    size: int
    overlap: float
    frames: int = 0

    @classmethod
    def of(cls, config: EncodersConfig) -> Tiling | None:
        """The tiling of a run's settings; None when nothing is cut."""
        if not config.tile_size and not config.tile_frames:
            return None
        return cls(size=config.tile_size, overlap=config.tile_overlap, frames=config.tile_frames)

    def cut(self, clip: tuple[int, int, int], *, compression: tuple[int, int], causal: bool) -> Cut | None:
        """How a clip is cut for encoding; None where no length exceeds its tile.

        Args:
            clip: frames, height and width.
            compression: frames per latent frame, pixels per latent pixel.
            causal: a causal autoencoder's clips are never cut in time: its windows would each have a frame of their own.
        """
        num_frames, height, width = clip
        space = time = None
        if self.size and max(height, width) > self.size:
            space = Steps(before=self.size, after=self.size // compression[1], overlap=self.overlap)
        if self.frames and num_frames > self.frames and not causal:
            time = Steps(before=self.frames, after=self.frames // compression[0], overlap=self.overlap)
        return None if space is None and time is None else Cut(space=space, time=time)


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """Tiles of one axis: first line, lines before, lines after (None: as they come)."""

    starts: list[int]
    before: int
    after: list[int | None]

    @classmethod
    def of(cls, steps: Steps | None, length: int) -> _Axis:
        if steps is None:
            return cls(starts=[0], before=length, after=[None])
        starts = steps.starts(length)
        return cls(starts=starts, before=steps.before, after=[steps.made_of(length, start) for start in starts])

    def sizes(self, length: int) -> list[int]:
        """Lines of each tile before it goes through."""
        return [min(self.before, length - start) for start in self.starts]


def tile_sizes(lengths: tuple[int, int, int], cut: Cut | None) -> Counter[tuple[int, int, int]]:
    """How many tiles of each size (t, h, w) a clip of these lengths is cut into."""
    if cut is None:
        return Counter([lengths])
    time, rows, columns = (
        _Axis.of(steps, length).sizes(length) for steps, length in zip((cut.time, cut.space, cut.space), lengths, strict=True)
    )
    return Counter((t, h, w) for t in time for h in rows for w in columns)


def tiled(
    whole: Tensor, through: Callable[[Tensor], Tensor], *, cut: Cut, group: dist.ProcessGroup | None = None, to: int = 0
) -> Tensor | None:
    """What `through` makes of a picture or clip, tile by tile.

    Args:
        whole: [..., T, H, W], on every rank of the group.
        through: one tile [..., t, h, w] -> another of the lengths that `cut` says.
        cut: where the tiles are.
        group: ranks that share out the tiles; None computes all here.
        to: rank within the group that gets the result; the others get None.
    """
    axes = [_Axis.of(steps, length) for steps, length in zip((cut.time, cut.space, cut.space), whole.shape[-3:], strict=True)]
    time, rows, columns = axes
    places = [(t, y, x) for t in range(len(time.starts)) for y in range(len(rows.starts)) for x in range(len(columns.starts))]
    size, rank = (1, 0) if group is None else (group.size(), (group.rank() - to) % group.size())
    own: Iterator[Tensor] = (through(_tile(whole, axes, place)) for place in places[rank::size])
    if group is not None and size > 1:
        sides = [tuple(axis.after[number] for axis, number in zip(axes, place, strict=True)) for place in places]
        collected = _collect(list(own), sides, group=group, to=to)
        if collected is None:
            return None
        own = iter(collected)
    windows = [_joined([[next(own) for _ in columns.starts] for _ in rows.starts], cut.space) for _ in time.starts]
    return _joined_in_time(windows, cut.time)


def _tile(whole: Tensor, axes: list[_Axis], place: tuple[int, int, int]) -> Tensor:
    for dim, axis, number in zip((-3, -2, -1), axes, place, strict=True):
        start = axis.starts[number]
        whole = whole.narrow(dim, start, min(axis.before, whole.shape[dim] - start))
    return whole


def _collect(own: list[Tensor], sides: list[tuple[int | None, ...]], *, group: dist.ProcessGroup, to: int) -> list[Tensor] | None:
    """All tiles in order on rank `to`, whose own are numbers 0, size, 2 size, ...; None on the others, which send theirs in order."""
    receiver = dist.get_global_rank(group, to)
    if group.rank() != to:
        contiguous = [part.contiguous() for part in own]
        for request in [dist.isend(part, receiver, group=group) for part in contiguous]:
            assert request is not None
            request.wait()
        return None
    parts: list[Tensor] = []
    like = own[0]
    for number, lengths in enumerate(sides):
        if number % group.size() == 0:
            parts.append(own[number // group.size()])
            continue
        shape = [had if length is None else length for had, length in zip(like.shape[-3:], lengths, strict=True)]
        part = torch.empty((*like.shape[:-3], *shape), dtype=like.dtype, device=like.device)
        dist.recv(part, dist.get_global_rank(group, (to + number) % group.size()), group=group)
        parts.append(part)
    return parts


def _joined(tiles: list[list[Tensor]], steps: Steps | None) -> Tensor:
    """Tiles of one window, blended with the one above and the one to the left, cut to what is kept and put together."""
    if steps is None:
        return tiles[0][0]
    rows: list[Tensor] = []
    for i, row in enumerate(tiles):
        for j, part in enumerate(row):
            if i > 0:
                _blend(tiles[i - 1][j], part, dim=-2, extent=steps.extent)
            if j > 0:
                _blend(row[j - 1], part, dim=-1, extent=steps.extent)
        rows.append(torch.cat([part[..., : steps.limit, : steps.limit] for part in row], dim=-1))
    return torch.cat(rows, dim=-2)


def _joined_in_time(windows: list[Tensor], steps: Steps | None) -> Tensor:
    """Windows blended with the one before; the last is kept whole, which is never more than `limit` unless a shorter one was left out."""
    if steps is None:
        return windows[0]
    for before, after in zip(windows[:-1], windows[1:], strict=True):
        _blend(before, after, dim=-3, extent=steps.extent)
    return torch.cat([*(window[..., : steps.limit, :, :] for window in windows[:-1]), windows[-1]], dim=-3)


def _blend(before: Tensor, after: Tensor, *, dim: int, extent: int) -> None:
    """Let the first lines of `after` go over from the last ones of `before`: line y is before (1 - y / extent) + after y / extent."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    if extent == 0:
        return
    share = torch.arange(extent, dtype=torch.float64, device=after.device) / extent
    share = share.to(torch.promote_types(after.dtype, torch.float32)).view(-1, *([1] * (-1 - dim)))
    lines = after.narrow(dim, 0, extent)
    lines.copy_(before.narrow(dim, before.shape[dim] - extent, extent) * (1 - share) + lines * share)

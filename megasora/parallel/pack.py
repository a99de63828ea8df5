"""The pack: several samples of any shape laid out as one token dimension, and each rank's share of it.

A pack has two streams, the text tokens of all its samples and then their video tokens. Each stream is padded once, at its end, by a
**dummy sample** that attends only to itself and has weight 0, so that every rank's share is equal. Token j of a stream belongs to
context rank j mod CP (so every sample is spread evenly over the context ranks, whatever its length), and a context rank's tokens are cut
into TP equal runs for sequence parallelism. A rank's **share** is [its text tokens; its video tokens].

Everything else follows from one index. An all-gather over TP gives the context rank's tokens as [share of tp 0; share of tp 1; ...]
(the *joint order*), an all-to-all over the context group the joint orders of its members one after the other. Attention is full, per
sample and without mask, so the order of tokens inside a sample is free; kernels get them grouped by sample (`Attention order`).

This file is arithmetic on indices: no process group, no communication. Shape letters: s tokens of a share, S tokens of a context rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from megasora.config.errors import UserError
from megasora.parallel.transfer import send_tables

Table = TypeVar("Table")

TILE_TOKENS = 64
"""Tokens that one program of a kernel sums before samples are summed: its partial sums are 8 / (2 x 64) of a bf16 tensor's bytes."""


@dataclass(frozen=True, kw_only=True)
class SampleShape:
    """Token counts of one sample."""

    text_tokens: int
    grid: tuple[int, int, int]
    """Video tokens along (time, height, width)."""

    @property
    def video_tokens(self) -> int:
        """Video tokens of the sample."""
        t, h, w = self.grid
        return t * h * w

    @property
    def tokens(self) -> int:
        """Text and video tokens."""
        return self.text_tokens + self.video_tokens


@dataclass(frozen=True, kw_only=True)
class PackSplit:
    """How packs are cut: sizes of the two axes that share tokens, and the kernels' row multiple."""

    tp: int = 1
    cp: int = 1
    row_multiple: int = 1
    """Each stream's length on a context rank is a multiple of tp x row_multiple: 1, 16 with FP8, 128 with blockwise FP8."""

    def padded(self, tokens: int) -> int:
        """Smallest length of a stream of `tokens` real tokens that gives every rank an equal share."""
        unit = self.tp * self.cp * self.row_multiple
        return -(-tokens // unit) * unit

    def share_tokens(self, samples: Sequence[SampleShape]) -> int:
        """Tokens of one rank's share (text and video) of a pack."""
        text = self.padded(sum(sample.text_tokens for sample in samples))
        video = self.padded(sum(sample.video_tokens for sample in samples))
        return (text + video) // (self.tp * self.cp)


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Which sample each token of a share belongs to; what per-sample modulation needs.

    Dummy tokens are assigned to the last sample: they never reach the loss, so its modulation gets a zero gradient from them.
    """

    index: Tensor
    """int64 [s], sample of each token."""
    num_samples: int
    bounds: tuple[tuple[int, int, int], ...]
    """(first token, token after the last, sample) of each stretch of one sample's tokens, in order; host numbers."""
    tiles: Tensor
    """int32 [tiles, 3]: (first token, token after the last, sample); at most TILE_TOKENS tokens, all of one sample."""

    @classmethod
    def of(cls, sample: Tensor, *, num_samples: int) -> Runs:
        """Runs of a host tensor, int64 [s], that names each token's sample; its tensors are on the host too."""
        samples, counts = torch.unique_consecutive(sample, return_counts=True)
        stops = counts.cumsum(0).tolist()
        bounds = tuple(zip([0, *stops], stops, samples.tolist(), strict=False))
        tiles = [
            (first, min(first + TILE_TOKENS, stop), number) for start, stop, number in bounds for first in range(start, stop, TILE_TOKENS)
        ]
        return cls(index=sample, num_samples=num_samples, bounds=bounds, tiles=torch.tensor(tiles, dtype=torch.int32).view(-1, 3))

    @cached_property
    def tile_one_hot(self) -> Tensor:
        """fp32 [num_samples, tiles] with a 1 where the tile is the sample's: what tiles summed becomes what samples sum."""
        samples = torch.arange(self.num_samples, device=self.index.device)
        return (samples[:, None] == self.tiles[None, :, 2]).float()

    @cached_property
    def one_hot(self) -> Tensor:
        """fp32 [num_samples, s] with a 1 where the token is the sample's: a segment sum is a product with it."""
        samples = torch.arange(self.num_samples, device=self.index.device)
        return (samples[:, None] == self.index[None, :]).float()


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where a stream's tokens stand in a longer order: token i at `index[i]`, or at `start + i` when they stand together."""

    count: int
    """Tokens of the stream."""
    start: int = 0
    index: Tensor | None = None
    """int64 [count]."""


@dataclass(frozen=True, kw_only=True)
class HeadRows:
    """Where attention wants a context rank's tokens: streams alone and in joint order."""

    length: int
    """Tokens of the context rank."""
    text: Rows
    video: Rows
    joint: Rows


@dataclass(frozen=True, kw_only=True)
class AttentionOrder:
    """Tokens of one or more context ranks, grouped by sample for an attention kernel."""

    index: Tensor | None
    """int64: position (in the joint order) of each token in attention order; None when the joint order will do."""
    inverse: Tensor | None
    """int64: inverse of `index`."""
    lengths: tuple[int, ...]
    """Tokens of each sample, in order, the dummy last when there is one."""
    cu_seqlens: Tensor
    """int32 [samples + 1] cumulative lengths, on the pack's device (copied once, used by every layer)."""

    @property
    def max_seqlen(self) -> int:
        """Longest sample."""
        return max(self.lengths)


class Pack:
    """One rank's view of a micro-batch.

    Args:
        samples: shapes of the pack's samples, at least one.
        split: sizes of the axes.
        tp_rank, cp_rank: this rank's place on them.
        device: where index tensors live.

    Raises:
        UserError: no sample, or a sample without text or video tokens.
    """

    def __init__(
        self,
        samples: Sequence[SampleShape],
        *,
        split: PackSplit,
        tp_rank: int = 0,
        cp_rank: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not samples or any(sample.text_tokens < 1 or sample.video_tokens < 1 for sample in samples):
            raise UserError(f"a pack needs at least one sample, each with text and video tokens; got {list(samples)}")
        self.samples = tuple(samples)
        self.split = split
        self.tp_rank, self.cp_rank = tp_rank, cp_rank
        self.device = torch.device(device)
        self.text_length = split.padded(sum(sample.text_tokens for sample in samples))
        self.video_length = split.padded(sum(sample.video_tokens for sample in samples))
        ranks = split.tp * split.cp
        self.num_text = self.text_length // ranks
        """Text tokens of this share."""
        self.num_video = self.video_length // ranks
        """Video tokens of this share."""
        self._text_sample = _sample_of_each([sample.text_tokens for sample in samples], self.text_length)
        self._video_sample = _sample_of_each([sample.video_tokens for sample in samples], self.video_length)

    @property
    def num_samples(self) -> int:
        """Samples of the pack, without the dummy."""
        return len(self.samples)

    def prepare(self, cp_ranks: Iterable[Sequence[int]]) -> None:
        """Make what the model asks of this pack, and send it to the device in one copy, before the step starts.

        Asked for later it is sent piece by piece, still without making the host wait, but the device waits for the host's arithmetic.

        Args:
            cp_ranks: context ranks whose joint orders are attended together, one entry per `attention_order` to come.
        """
        keys = [tuple(ranks) for ranks in cp_ranks]
        streams = (self._text_sample, self._video_sample)
        tables = [self._make_positions(), *map(self._make_runs, streams), self._make_runs(*streams)]
        sent = send_tables([*tables, *map(self._build_order, keys)], device=self.device)
        self.positions, self.text_runs, self.video_runs, self.joint_runs = sent[:4]
        self._orders.update(zip(keys, sent[4:], strict=True))

    def _send(self, table: Table) -> Table:
        (sent,) = send_tables([table], device=self.device)
        result: Table = sent
        return result

    @cached_property
    def text_index(self) -> Tensor:
        """int64 [num_text]: place in the padded text stream of each text token of this share."""
        return _arange(self._share(self.text_length), device=self.device)

    @cached_property
    def video_index(self) -> Tensor:
        """int64 [num_video]: place in the padded video stream of each video token of this share."""
        return _arange(self._share(self.video_length), device=self.device)

    def _share(self, length: int, *, tp_rank: int | None = None, cp_rank: int | None = None) -> range:
        """Places in a padded stream of the tokens of a share, this rank's if no other is named."""
        tp_rank = self.tp_rank if tp_rank is None else tp_rank
        cp_rank = self.cp_rank if cp_rank is None else cp_rank
        return range(cp_rank, length, self.split.cp)[_part(length // self.split.cp, tp_rank, self.split.tp)]

    def _of_share(self, sample: Tensor) -> Tensor:
        """Sample of each token of this share of a stream."""
        share = self._share(len(sample))
        return sample[share.start : share.stop : share.step].clamp(max=self.num_samples - 1)

    def _make_runs(self, *streams: Tensor) -> Runs:
        return Runs.of(torch.cat([self._of_share(stream) for stream in streams]), num_samples=self.num_samples)

    @cached_property
    def text_runs(self) -> Runs:
        """Sample of each text token of this share."""
        return self._send(self._make_runs(self._text_sample))

    @cached_property
    def video_runs(self) -> Runs:
        """Sample of each video token of this share."""
        return self._send(self._make_runs(self._video_sample))

    @cached_property
    def joint_runs(self) -> Runs:
        """Sample of each token of this share, text first."""
        return self._send(self._make_runs(self._text_sample, self._video_sample))

    def video_part(self, sample: int) -> tuple[slice, slice]:
        """Where this share holds video tokens of one sample: they stand together, and are every CP-th of the sample's.

        Returns:
            (places in the share's video tokens, token numbers within the sample).
        """
        return _part_of(sample, self._share(self.video_length), [shape.video_tokens for shape in self.samples])

    def text_part(self, sample: int) -> tuple[slice, slice]:
        """Where this share holds text tokens of one sample; see `video_part`."""
        return _part_of(sample, self._share(self.text_length), [shape.text_tokens for shape in self.samples])

    def video_tokens_of(self, sample: int) -> tuple[Tensor, Tensor]:
        """`video_part` as two int64 tensors, made on the device."""
        places, tokens = (_arange(part, device=self.device) for part in self.video_part(sample))
        return places, tokens

    def text_tokens_of(self, sample: int) -> tuple[Tensor, Tensor]:
        """`text_part` as two int64 tensors, made on the device."""
        places, tokens = (_arange(part, device=self.device) for part in self.text_part(sample))
        return places, tokens

    def joint_stream_index(self, cp_ranks: Sequence[int]) -> Tensor:
        """Place of each token in the stream [padded text; padded video] for the joint orders of `cp_ranks`, one after the other."""
        parts: list[Tensor] = []
        for cp_rank in cp_ranks:
            for tp_rank in range(self.split.tp):
                parts.append(_arange(self._share(self.text_length, tp_rank=tp_rank, cp_rank=cp_rank)))
                parts.append(_arange(self._share(self.video_length, tp_rank=tp_rank, cp_rank=cp_rank)) + self.text_length)
        return torch.cat(parts)

    def attention_order(self, cp_ranks: Sequence[int]) -> AttentionOrder:
        """Grouping by sample of the joint orders of `cp_ranks` (cached)."""
        key = tuple(cp_ranks)
        if key not in self._orders:
            self._orders[key] = self._send(self._build_order(key))
        return self._orders[key]

    @cached_property
    def _orders(self) -> dict[tuple[int, ...], AttentionOrder]:
        return {}

    def _build_order(self, cp_ranks: tuple[int, ...]) -> AttentionOrder:
        sample = torch.cat([self._text_sample, self._video_sample])[self.joint_stream_index(cp_ranks)]
        lengths = tuple(torch.bincount(sample, minlength=self.num_samples + 1).tolist())
        if lengths[-1] == 0:
            lengths = lengths[:-1]
        cu_seqlens = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        if len(lengths) == 1:
            return AttentionOrder(index=None, inverse=None, lengths=lengths, cu_seqlens=cu_seqlens)
        index = torch.argsort(sample, stable=True)
        inverse = torch.empty_like(index)
        inverse[index] = torch.arange(len(index))
        return AttentionOrder(index=index, inverse=inverse, lengths=lengths, cu_seqlens=cu_seqlens)

    def head_rows(self, cp_ranks: Sequence[int] | None) -> HeadRows:
        """Where this context rank's tokens go (cached): to `attention_order(cp_ranks)`, an order of its own tokens alone, or (None) to
        joint order."""
        key = None if cp_ranks is None else tuple(cp_ranks)
        if key not in self._head_rows:
            inverse = None if key is None else self.attention_order(key).inverse
            self._head_rows[key] = self._build_head_rows(inverse)
        return self._head_rows[key]

    @cached_property
    def _head_rows(self) -> dict[tuple[int, ...] | None, HeadRows]:
        return {}

    def _build_head_rows(self, inverse: Tensor | None) -> HeadRows:
        text, video = self.text_length // self.split.cp, self.video_length // self.split.cp
        length = text + video
        if inverse is None and self.split.tp == 1:
            streams = Rows(count=text), Rows(count=video, start=text)
        else:
            places = torch.arange(length, device=self.device) if inverse is None else inverse
            of_text, of_video = (part.contiguous() for part in self.split_streams(places))  # runs of one token would be a strided view
            streams = Rows(count=text, index=of_text), Rows(count=video, index=of_video)
        return HeadRows(length=length, text=streams[0], video=streams[1], joint=Rows(count=length, index=inverse))

    def join_streams(self, text: Tensor, video: Tensor) -> Tensor:
        """[S_text, ...] and [S_video, ...] of this context rank -> [S, ...] in joint order."""
        tp = self.split.tp
        runs = [stream.view(tp, stream.shape[0] // tp, *stream.shape[1:]) for stream in (text, video)]
        return torch.cat(runs, dim=1).flatten(0, 1)

    def split_streams(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of `join_streams`."""
        runs = joint.view(self.split.tp, self.num_text + self.num_video, *joint.shape[1:])
        text, video = runs.split([self.num_text, self.num_video], dim=1)
        return text.flatten(0, 1), video.flatten(0, 1)

    @cached_property
    def positions(self) -> Tensor:
        """float64 [S, 3]: (t, h, w) of each token of this context rank in joint order; text and dummy tokens stand at 0 (FLUX)."""
        return self._send(self._make_positions())

    def _make_positions(self) -> Tensor:
        stream = torch.zeros(self.text_length + self.video_length, 3, dtype=torch.float64)
        start = self.text_length
        for sample in self.samples:
            axes = [torch.arange(extent, dtype=torch.float64) for extent in sample.grid]
            stream[start : start + sample.video_tokens] = torch.cartesian_prod(*axes).reshape(-1, 3)
            start += sample.video_tokens
        return stream[self.joint_stream_index([self.cp_rank])]


def _part(length: int, number: int, parts: int) -> slice:
    """One of `parts` equal runs of [0, length)."""
    return slice(length * number // parts, length * (number + 1) // parts)


def _arange(numbers: range | slice, *, device: torch.device | None = None) -> Tensor:
    """int64 numbers, made where they are wanted: nothing is copied."""
    return torch.arange(numbers.start, numbers.stop, numbers.step or 1, device=device)


def _part_of(sample: int, share: range, lengths: list[int]) -> tuple[slice, slice]:
    """(places in the share, token numbers within the sample) of one sample's tokens in a share of a stream of samples."""
    start = sum(lengths[:sample])
    first, stop = (min(len(range(share.start, place, share.step)), len(share)) for place in (start, start + lengths[sample]))
    tokens = share[first:stop]
    if not tokens:
        return slice(first, first, 1), slice(0, 0, share.step)
    return slice(first, stop, 1), slice(tokens.start - start, tokens[-1] - start + 1, share.step)


def _sample_of_each(lengths: list[int], padded: int) -> Tensor:
    """int64 [padded]: sample number of each token of a stream; the dummy's number is len(lengths)."""
    counts = torch.tensor([*lengths, padded - sum(lengths)])
    return torch.repeat_interleave(torch.arange(len(counts)), counts)

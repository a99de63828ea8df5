"""Clips of the coming steps: which, and the levels of those that this rank decodes.

Samples are dealt out whole to the replicas, and a replica's to its ranks, each of which decodes its own ahead of the step; `levels_of_all`
gives every rank of the replica a clip when its turn comes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megasora.config.autoencoder_run import AutoencoderRunConfig
from megasora.config.errors import UserError
from megasora.config.schema import ModelConfig
from megasora.data.buckets import frame_span, num_starts, pixels_of
from megasora.data.decoding.contract import DecodeError, Decoder, DecodeRequest
from megasora.data.loader import ClipLoader
from megasora.data.manifest import Clip, SkippedRow
from megasora.data.plan import PlannedClip, SamplerState, StepPlan, assign_packs, next_step, plan_clips, request_of, start_of
from megasora.data.quarantine import Quarantine
from megasora.diffusion.philox import Stream, key_of, uniform
from megasora.parallel.agreement import had_by_all
from megasora.parallel.groups import ParallelContext
from megasora.parallel.transfer import send
from megasora.training.autoencoder.backward import ClipDraws

LINEAR = 1 << 20
"""A width at which the plan's cost of a sample, made for attention, is in proportion to its size, as an autoencoder's is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnClip:
    """A clip of a step that this rank works on, alone or with the other ranks of its replica."""

    name: str
    sample: int
    """Its number among the planned clips."""
    shape: tuple[int, int, int]
    """Frames, height, width."""
    decoder: int
    """Rank within the replica that decodes it."""
    levels: Tensor | str | None
    """uint8 [3, T, H, W] on the device, or why there is none; None where another rank decodes it."""
    draws: ClipDraws
    features: Tensor | None = None
    """A teacher's [D, t, h, w] on the device, where they are read from a cache."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipBatch:
    """A step on this rank."""

    plan: StepPlan
    clips: tuple[OwnClip, ...]
    frames: int
    """Of the whole step, over all ranks."""
    images: int
    """Samples of the whole step that are one frame."""
    wait_s: float


def plan_training_clips(clips: Sequence[Clip], config: AutoencoderRunConfig) -> tuple[tuple[PlannedClip, ...], tuple[SkippedRow, ...]]:
    """Shapes of all clips that fit, and the ones that do not.

    Raises:
        UserError: none fits.
    """
    data = config.data
    planned, unfit = plan_clips(
        clips, data=data.planned_as(), encoders=config.encoders_as(), model=ModelConfig(patch_size=1, in_channels=1)
    )
    if data.aspect == "nearest":
        return planned, unfit
    side = round(pixels_of(data.resolution) ** 0.5)
    unit = config.autoencoder.spatial_compression
    square = (replace(clip, height=side, width=side, grid=(clip.grid[0], side // unit, side // unit)) for clip in planned)
    return tuple(square), unfit


def as_image(clip: PlannedClip) -> PlannedClip:
    """A clip's first frame alone."""
    return replace(clip, num_frames=1, span=None, grid=(1, *clip.grid[1:]))


def spread_out(clip: PlannedClip, *, most: int, uniform: float) -> PlannedClip:
    """A clip with its frames some strides apart.

    Args:
        clip: with its frames one stride apart.
        most: strides.
        uniform: number in (0, 1) that chooses evenly among 1 to the most that the clip is long enough for.
    """
    available, gaps = clip.clip.num_frames, clip.num_frames - 1
    widest = max(1, min(most, (available - 1) // (gaps * clip.stride)))
    stride = clip.stride * min(widest, 1 + int(uniform * widest))
    return replace(clip, stride=stride, num_starts=num_starts(available, frame_span(clip.num_frames, stride)))


class ClipFeeder:
    """Yields `ClipBatch`es from a sampler state on.

    Args:
        clips: planned clips, the same on every rank.
        config: the run.
        context: this rank's groups.
        decoder: the run's.
        state: where the sampler stands.
        first_step: 0-based number of the next step.
        left_out: positions of the sampler whose step is passed over.
        quarantine: clips that are not decoded.
    """

    def __init__(
        self,
        clips: Sequence[PlannedClip],
        *,
        config: AutoencoderRunConfig,
        context: ParallelContext,
        decoder: Decoder,
        state: SamplerState,
        first_step: int,
        left_out: Collection[SamplerState] = (),
        quarantine: Quarantine | None = None,
    ) -> None:
        self.clips, self.config, self.context = clips, config, context
        self._left_out = frozenset(left_out)
        self._planned: deque[_Planned] = deque()
        data = config.data
        self._loader = ClipLoader(
            self._requests(state, first_step),
            decoder=decoder,
            workers=data.decode_workers,
            ahead=data.prefetch_steps,
            timeout_s=data.decode_timeout_s,
            give="pixels",
            quarantine=quarantine,
        )

    def __iter__(self) -> Iterator[ClipBatch]:
        """Steps until the run's last."""
        for loaded in self._loader:
            planned = self._planned.popleft()
            mine, decoded = self.context.replica.rank(), iter(loaded.clips)
            own = (replace(clip, levels=self._levels(next(decoded))) if clip.decoder == mine else clip for clip in planned.clips)
            yield ClipBatch(plan=planned.plan, clips=tuple(own), frames=planned.frames, images=planned.images, wait_s=loaded.wait_s)

    def close(self) -> None:
        """Stop decoding."""
        self._loader.close()

    def _levels(self, decoded: Tensor | DecodeError) -> Tensor | str:
        if isinstance(decoded, DecodeError):
            return str(decoded)
        (pixels,) = send([decoded], device=self.context.device)
        if pixels is decoded and decoded.is_cuda:  # decoded there by a thread, whose stream's memory it is
            decoded.record_stream(torch.cuda.current_stream(self.context.device))
        return pixels

    def _requests(self, state: SamplerState, first_step: int) -> Iterator[list[DecodeRequest]]:
        data, seed, topology = self.config.data, self.config.train.seed, self.context.topology
        ones = [1] * len(self.clips)
        for step in range(first_step, self.config.train.steps):
            while True:
                plan = next_step(ones, state, seed=seed, global_tokens=data.batch_size)
                position, state = state, plan.state_after
                if position not in self._left_out:
                    break
            shaped = [self._shaped(sample, plan.epoch, step) for sample in plan.samples]
            packs = assign_packs([clip.tokens for clip in shaped], data_parallel_size=topology.dp, num_microbatches=1, hidden_size=LINEAR)
            (own,) = packs[self.context.at.dp]
            clips = [self._own(plan, place, number, shaped[place], step) for number, place in enumerate(own)]
            self._planned.append(
                _Planned(
                    plan=plan,
                    clips=clips,
                    frames=sum(clip.num_frames for clip in shaped),
                    images=sum(clip.num_frames == 1 for clip in shaped),
                )
            )
            mine = self.context.replica.rank()
            yield [
                self._request(shaped[place], plan.samples[place], plan.epoch, step)
                for place, clip in zip(own, clips, strict=True)
                if clip.decoder == mine
            ]

    def _own(self, plan: StepPlan, place: int, number: int, clip: PlannedClip, step: int) -> OwnClip:
        """The replica's clip with this number, before it is decoded."""
        return OwnClip(
            name=clip.clip.id,
            sample=plan.samples[place],
            shape=(clip.num_frames, clip.height, clip.width),
            decoder=number % self.context.replica.size(),
            levels=None,
            draws=self._draws(plan.samples[place], plan.epoch, step),
        )

    def _key(self, stream: Stream, sample: int, epoch: int, step: int) -> int:
        return key_of(seed=self.config.train.seed, stream=stream, epoch=epoch, sample=sample, step=step)

    def _shaped(self, sample: int, epoch: int, step: int) -> PlannedClip:
        """The clip as it is taken this time: whole, or its first frame."""
        clip, share = self.clips[sample], self.config.data.image_share
        image = share > 0 and uniform(key=self._key(Stream.IMAGE, sample, epoch, step)) < share
        if clip.num_frames == 1 or image:
            return as_image(clip)
        most = self.config.data.max_frame_interval
        return clip if most == 1 else spread_out(clip, most=most, uniform=uniform(key=self._key(Stream.INTERVAL, sample, epoch, step)))

    def _request(self, clip: PlannedClip, sample: int, epoch: int, step: int) -> DecodeRequest:
        offset = 0
        if self.config.data.temporal_start == "random" and clip.num_starts > 1:
            offset = start_of(clip, uniform=uniform(key=self._key(Stream.START, sample, epoch, step)))
        return request_of(clip, offset=offset)

    def _draws(self, sample: int, epoch: int, step: int) -> ClipDraws:
        return ClipDraws(posterior=self._key(Stream.VAE, sample, epoch, step), patches=self._key(Stream.PATCHES, sample, epoch, step))


@dataclass(frozen=True, kw_only=True)
class _Planned:
    plan: StepPlan
    clips: list[OwnClip]
    """The replica's, not decoded yet."""
    frames: int
    images: int


def levels_of_all(clip: OwnClip, context: ParallelContext) -> Tensor:
    """A clip's levels on every rank of its replica, which call it together for a clip that could be decoded."""
    group = context.replica
    if group.size() == 1:
        assert isinstance(clip.levels, Tensor), "the only rank decodes every clip"
        return clip.levels
    mine = clip.levels
    levels = mine.contiguous() if isinstance(mine, Tensor) else torch.empty((3, *clip.shape), dtype=torch.uint8, device=context.device)
    dist.broadcast(levels, src=dist.get_global_rank(group, clip.decoder), group=group)
    return levels


def held_out_clips(clips: Sequence[PlannedClip], *, decoder: Decoder, most: int) -> list[tuple[str, Tensor]]:
    """(name, pixels uint8 [3, T, H, W]) of the first clips that every rank can decode, from their first frames. All ranks call it together.

    Raises:
        UserError: there is none; the same on every rank.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    reason = "there are none"
    for number, clip in enumerate(itertools.islice(clips, 4 * most)):
        if len(found) == most:
            break
        try:
            found[number] = clip.clip.id, decoder.pixels(request_of(clip)).cpu()
        except DecodeError as error:
            reason = str(error)
    shared = had_by_all(found)
    if not shared:
        reasons: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, None if found else reason)
        first = next((said for said in reasons if said is not None), f"ranks fail at different ones, the last: {reason}")
        raise UserError(f"no held-out clip can be decoded: {first}")
    return [found[number] for number in shared]

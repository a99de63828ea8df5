"""Which samples make up a step, and how they fall into packs. Pure arithmetic on token counts.

A step takes the next samples of the epoch's permutation until one more would exceed the token budget; that one opens the next step. An
epoch's last step may be short. The sampler's whole state is (epoch, consumed), and none of this knows of ranks: the layout only decides
how a step's samples fall into packs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megasora.config.errors import UserError
from megasora.config.schema import DataConfig, EncodersConfig, ModelConfig
from megasora.data.buckets import (
    LEAST_PIXELS,
    Rule,
    available_frames,
    choose_frames,
    choose_size,
    frame_span,
    named_fps,
    num_starts,
    pixels_of,
    stride_to,
    token_grid,
)
from megasora.data.cascade import Cascade, Outcome
from megasora.data.decoding.contract import DecodeRequest
from megasora.data.manifest import Clip, SkippedRow


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedClip:
    """A clip with the shape it trains at."""

    clip: Clip
    num_frames: int
    height: int
    width: int
    stride: int
    resolution: str
    """Its resolution class."""
    grid: tuple[int, int, int]
    """Video tokens along (time, height, width)."""
    text_tokens: int
    probability: float = 1.0
    """That the clip trains at this shape each time it is taken; with data.resolution_mix the weights say it instead."""
    span: int | None = None
    """Frames of the file that its frames are spread over evenly; None means the exact stride."""
    num_starts: int = 1
    """First frames there are to choose from (data.temporal_start)."""
    named_fps: int | float | None = None
    """Frame rate that its caption names."""

    @property
    def tokens(self) -> int:
        """Text and video tokens."""
        t, h, w = self.grid
        return self.text_tokens + t * h * w

    @property
    def fps(self) -> float | None:
        """Sampled frames per second; None for an image, and where the manifest does not say."""
        return self.clip.fps / self.stride if self.num_frames > 1 and not math.isnan(self.clip.fps) else None


def plan_clip(
    clip: Clip,
    *,
    data: DataConfig,
    encoders: EncodersConfig,
    patch_size: int,
    resolution: str | None = None,
    num_frames: int | None = None,
    probability: float = 1.0,
) -> PlannedClip:
    """Shape a clip trains at.

    Args:
        clip: a row of the manifest.
        data, encoders, patch_size: the run's.
        resolution: class of sizes; None takes data.resolution.
        num_frames: its frame count; None takes the longest of data.frame_counts that it fills.
        probability: of this shape, each time the clip is taken.

    Raises:
        ValueError: it is too short for every allowed frame count, or larger than a pack's or a step's budget.
    """
    stride = _stride_of(clip, data)
    available = available_frames(clip.num_frames, stride, rule=data.buckets)
    if num_frames is None:
        num_frames = choose_frames(available, frame_counts=data.frame_counts, rule=data.buckets)
    if num_frames == 0:
        raise ValueError(f"{clip.num_frames} frames at stride {stride} fill none of {data.frame_counts}")
    unit = encoders.spatial_compression * patch_size
    height, width = _size_of(*_picture(clip), resolution or data.resolution, unit, data.buckets)
    span = frame_span(num_frames, stride, rule=data.buckets)
    planned = PlannedClip(
        clip=clip,
        num_frames=num_frames,
        height=height,
        width=width,
        stride=stride,
        resolution=resolution or data.resolution,
        grid=token_grid(
            num_frames,
            height,
            width,
            temporal_compression=encoders.temporal_compression,
            spatial_compression=encoders.spatial_compression,
            patch_size=patch_size,
            causal=encoders.causal,
        ),
        text_tokens=data.text_tokens,
        probability=probability,
        span=span if data.buckets == "published" and stride > 1 < num_frames else None,
        num_starts=num_starts(clip.num_frames, span, rule=data.buckets),
        named_fps=named_fps(clip.fps, stride, target_fps=data.target_fps) if clip.num_frames > 1 else None,
    )
    if planned.tokens > data.global_tokens:
        raise ValueError(f"{planned.tokens} tokens exceed data.global_tokens {data.global_tokens}")
    if data.max_pack_tokens is not None and planned.tokens > data.max_pack_tokens:
        raise ValueError(f"{planned.tokens} tokens exceed data.max_pack_tokens {data.max_pack_tokens}")
    return planned


def _stride_of(clip: Clip, data: DataConfig) -> int:
    return stride_to(clip.fps, target_fps=data.target_fps, rule=data.buckets) if clip.num_frames > 1 else 1


def _picture(clip: Clip) -> tuple[int, int]:
    """(height, width) of what is trained on."""
    _, _, width, height = clip.crop or (0, 0, clip.width, clip.height)
    return height, width


def classes_of(clip: Clip, data: DataConfig) -> tuple[str, ...]:
    """Resolution classes a clip may train at.

    nearest: the one class whatever its pixels; of a mix those whose pixels it has, or the smallest when it has too few for all. published:
    those of whose pixels it has 0.8 times, be it one class or a mix; there may be none.
    """
    names = sorted((name for name, weight in data.resolution_mix if weight > 0), key=pixels_of) or [data.resolution]
    height, width = _picture(clip)
    if data.buckets == "published":
        return tuple(name for name in names if name == "manifest" or height * width >= pixels_of(name) * LEAST_PIXELS)
    if not data.resolution_mix:
        return tuple(names)
    return tuple(name for name in names if pixels_of(name) <= height * width) or (names[0],)


@lru_cache(maxsize=4096)
def _size_of(height: int, width: int, resolution: str, multiple: int, rule: Rule) -> tuple[int, int]:
    """`choose_size`, once per source size: manifests hold few sizes and many clips."""
    return choose_size(height, width, resolution=resolution, multiple=multiple, rule=rule)


def shapes_of(clip: Clip, data: DataConfig, *, cascade: Cascade | None = None) -> tuple[Outcome, ...]:
    """Classes and frame counts a clip may train at; 0 frames where it fills none.

    Args:
        clip: a row of the manifest.
        data: the run's.
        cascade: of data.bucket_mix; None where that is empty.

    Raises:
        ValueError: it falls into no bucket, with the reason.
    """
    height, width = _picture(clip)
    stride = _stride_of(clip, data)
    available = available_frames(clip.num_frames, stride, rule=data.buckets)
    if cascade is None:
        frames = choose_frames(available, frame_counts=data.frame_counts, rule=data.buckets)
        found = tuple(Outcome(name, frames, 1.0) for name in classes_of(clip, data))
        reason = f"{height}x{width} is below {LEAST_PIXELS} x the pixels of every class"
    else:
        found = cascade.outcomes(available=available, pixels=height * width)
        reason = f"{available} frames (at stride {stride}) of {height}x{width} fall into no bucket of data.bucket_mix"
    if not found:
        raise ValueError(reason)
    return found


def plan_clips(
    clips: Sequence[Clip], *, data: DataConfig, encoders: EncodersConfig, model: ModelConfig
) -> tuple[tuple[PlannedClip, ...], tuple[SkippedRow, ...]]:
    """Shapes of all clips that fit, and the ones that do not with the reason.

    With a mix a clip is there once for each shape it may get, one after another; `mix_of` says how they are drawn.

    Raises:
        UserError: none fits.
    """
    planned: list[PlannedClip] = []
    skipped: list[SkippedRow] = []
    cascade = Cascade(data.bucket_mix, frame_counts=data.frame_counts) if data.bucket_mix else None
    for clip in clips:
        try:
            shapes = shapes_of(clip, data, cascade=cascade)
        except ValueError as error:
            skipped.append(SkippedRow(row=clip.row, reason=str(error)))
            continue
        for shape in shapes:
            try:
                planned.append(
                    plan_clip(
                        clip,
                        data=data,
                        encoders=encoders,
                        patch_size=model.patch_size,
                        resolution=shape.resolution,
                        num_frames=shape.num_frames,
                        probability=shape.probability,
                    )
                )
            except UserError:
                raise
            except ValueError as error:
                skipped.append(SkippedRow(row=clip.row, reason=str(error)))
    if not planned:
        raise UserError(f"no clip can be used; the first: {skipped[0].reason}")
    return tuple(planned), tuple(skipped)


def request_of(clip: PlannedClip, *, offset: int = 0) -> DecodeRequest:
    """What to decode for a planned clip.

    Args:
        clip: the planned clip.
        offset: its first frame, below clip.num_starts.
    """
    return DecodeRequest(
        path=clip.clip.path,
        start=clip.clip.start_frame + offset,
        stride=clip.stride,
        num_frames=clip.num_frames,
        span=clip.span,
        height=clip.height,
        width=clip.width,
        crop=clip.clip.crop,
        clip_id=clip.clip.id,
    )


@dataclass(frozen=True, kw_only=True)
class SamplerState:
    """Everything the sampler remembers."""

    epoch: int = 0
    consumed: int = 0
    """Samples of this epoch's permutation that earlier steps took."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The samples of one step, by number in the planned clips, in global order."""

    position: SamplerState
    """Where the sampler stood."""
    samples: tuple[int, ...]
    state_after: SamplerState

    @property
    def epoch(self) -> int:
        """Of all its samples."""
        return self.position.epoch


class Taken(NamedTuple):
    """A sample to decode or read."""

    sample: int
    """Number of the planned clip."""
    offset: int = 0
    """First of its frames, below its num_starts."""


def start_of(clip: PlannedClip, *, uniform: float) -> int:
    """One of a clip's first frames from a uniform number in (0, 1)."""
    return min(int(uniform * clip.num_starts), clip.num_starts - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mix:
    """How often samples are taken: a clip some times per epoch, each time at one of its shapes or, by the published mix, not at all."""

    first_sample: NDArray[np.int64]
    """Clip -> its first sample; its others follow."""
    times: NDArray[np.float64]
    """Clip -> times per epoch, on average."""
    cumulative: NDArray[np.float64]
    """Sample -> clip number + summed probability of the clip's shapes up to and with this one."""
    never_dropped: NDArray[np.bool_]
    """Clip -> whether its shapes' probabilities sum to 1."""


def mix_of(clips: Sequence[PlannedClip], data: DataConfig) -> Mix | None:
    """The mix of a run's planned clips; None when every sample is taken once per epoch.

    Raises:
        UserError: the weights leave nothing to train on.
    """
    if not data.resolution_mix and not data.bucket_mix and data.image_weight == 1.0 == data.video_weight:
        return None
    rows = np.array([clip.clip.row for clip in clips])
    starts: NDArray[np.int64] = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
    weights = dict(data.resolution_mix)
    share = np.array([weights.get(clip.resolution, clip.probability) for clip in clips])
    counts = np.diff(np.r_[starts, len(clips)])
    clip_of = np.repeat(np.arange(len(starts)), counts)
    totals = np.add.reduceat(share, starts)
    if not data.bucket_mix:  # weights need not sum to 1, and what is too large leaves its share to the clip's other classes
        share, totals = share / totals[clip_of], np.ones_like(totals)
    running = share.copy()
    for place in range(1, int(counts.max())):  # one sum per clip: a sum over all of them would round by their number
        at = starts[counts > place] + place
        running[at] += running[at - 1]
    times = np.array([data.image_weight if clips[start].num_frames == 1 else data.video_weight for start in starts.tolist()])
    if not times.any():
        raise UserError("data.image_weight and data.video_weight leave no clip to train on; raise one of them")
    return Mix(first_sample=starts, times=times, cumulative=clip_of + running, never_dropped=totals > 1 - 1e-9)


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, *, seed: int, epoch: int, mix: Mix | None = None) -> NDArray[np.int64]:
    """The samples of an epoch in order: numpy's Philox generator keyed by (seed, epoch). Without a mix, a permutation of all."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed & 0xFFFFFFFFFFFFFFFF, epoch], dtype=np.uint64)))
    if mix is None:
        return generator.permutation(num_samples)
    clips = len(mix.times)
    taken = np.repeat(np.arange(clips), np.floor(mix.times + generator.random(clips)).astype(np.int64))
    samples = np.searchsorted(mix.cumulative, taken + generator.random(len(taken)), side="right")
    last = np.r_[mix.first_sample[1:], num_samples][taken] - 1
    # beyond its last shape a clip is dropped; where shapes leave nothing over, rounding of a sum must not reach the next clip
    return generator.permutation(np.minimum(samples, last)[(samples <= last) | mix.never_dropped[taken]])


def next_step(tokens: Sequence[int], state: SamplerState, *, seed: int, global_tokens: int, mix: Mix | None = None) -> StepPlan:
    """The samples of the step that starts at `state`.

    Args:
        tokens: token count of every sample, none above global_tokens.
        state: where the last step ended.
        seed: of the order.
        global_tokens: the step's budget.
        mix: how often samples are taken; None takes each once per epoch.
    """
    order = epoch_order(len(tokens), seed=seed, epoch=state.epoch, mix=mix)
    taken: list[int] = []
    total = 0
    position = state.consumed
    while position < len(order) and total + tokens[order[position]] <= global_tokens:
        taken.append(int(order[position]))
        total += tokens[order[position]]
        position += 1
    ended = position == len(order)
    after = SamplerState(epoch=state.epoch + 1) if ended else SamplerState(epoch=state.epoch, consumed=position)
    return StepPlan(position=state, samples=tuple(taken), state_after=after)


def sample_cost(tokens: int, *, hidden_size: int) -> float:
    """Forward FLOPs of a sample per block: 24 H^2 S + 4 S^2 H (facts section 1)."""
    return 24.0 * hidden_size**2 * tokens + 4.0 * tokens**2 * hidden_size


def assign_packs(
    tokens: Sequence[int],
    *,
    data_parallel_size: int,
    num_microbatches: int,
    hidden_size: int,
    max_tokens: int | None = None,
    microbatch_multiple: int = 1,
) -> list[list[tuple[int, ...]]]:
    """Packs of near-equal cost: [replica][micro-batch] -> places within the step, ascending; exactly DP x M packs, some may be empty.

    Longest first onto the cheapest pack, then single moves from the dearest pack while they lower the largest cost. Deterministic.

    Args:
        tokens: of the step's samples.
        data_parallel_size: replicas.
        num_microbatches: M; raised where the packs of M micro-batches would exceed max_tokens.
        hidden_size: of the model, for the cost.
        max_tokens: most tokens of a pack; no sample may have more.
        microbatch_multiple: M is raised in steps of this (the pipeline size, when interleaved).

    Raises:
        ValueError: a sample has more tokens than a pack may hold.
    """
    if max_tokens is not None and max(tokens, default=0) > max_tokens:
        raise ValueError(f"a sample of {max(tokens)} tokens does not fit a pack of {max_tokens}")
    while (packs := _packed(tokens, data_parallel_size * num_microbatches, hidden_size, max_tokens)) is None:
        num_microbatches += microbatch_multiple
    return [
        [tuple(sorted(packs[replica * num_microbatches + m])) for m in range(num_microbatches)] for replica in range(data_parallel_size)
    ]


class _Packing:
    """Packs that are being filled: places, cost and tokens of each."""

    def __init__(self, tokens: Sequence[int], count: int, *, hidden_size: int, max_tokens: int | None) -> None:
        self.tokens = tokens
        self.costs = [sample_cost(n, hidden_size=hidden_size) for n in tokens]
        self.packs: list[list[int]] = [[] for _ in range(count)]
        self.loads = [0.0] * count
        self.filled = [0] * count
        self.most = sum(tokens) if max_tokens is None else max_tokens

    def put(self, place: int, pack: int) -> None:
        """Add a sample to a pack."""
        self.packs[pack].append(place)
        self.loads[pack] += self.costs[place]
        self.filled[pack] += self.tokens[place]

    def move(self, place: int, source: int, target: int) -> None:
        """Move a sample between packs."""
        self.packs[source].remove(place)
        self.loads[source] -= self.costs[place]
        self.filled[source] -= self.tokens[place]
        self.put(place, target)

    def room(self, pack: int) -> int:
        """Tokens a pack may still take."""
        return self.most - self.filled[pack]


def _packed(tokens: Sequence[int], count: int, hidden_size: int, max_tokens: int | None) -> list[list[int]] | None:
    """Places per pack; None when longest first cannot keep all packs under max_tokens."""
    packing = _Packing(tokens, count, hidden_size=hidden_size, max_tokens=max_tokens)
    cheapest = [(0.0, k) for k in range(count)]  # already a heap
    for place in sorted(range(len(tokens)), key=lambda p: (-packing.costs[p], p)):
        full: list[tuple[float, int]] = []
        while cheapest and packing.room(cheapest[0][1]) < tokens[place]:
            full.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        _, target = cheapest[0]
        packing.put(place, target)
        heapq.heapreplace(cheapest, (packing.loads[target], target))
        for entry in full:
            heapq.heappush(cheapest, entry)
    _refine(packing)
    return packing.packs


def _refine(packing: _Packing, *, rounds: int = 64) -> None:
    """Move or swap samples between the dearest and the cheapest pack while that lowers the larger cost."""
    costs, loads, tokens = packing.costs, packing.loads, packing.tokens
    for _ in range(rounds):
        dearest = max(range(len(loads)), key=lambda k: (loads[k], -k))
        cheapest = min(range(len(loads)), key=lambda k: (loads[k], k))
        gap, room = loads[dearest] - loads[cheapest], packing.room(cheapest)
        given, taken = ({costs[p]: p for p in reversed(packing.packs[k])}.values() for k in (dearest, cheapest))  # one place of each cost
        moves = [place for place in given if 0 < costs[place] < gap and tokens[place] <= room]
        swaps = [(a, b) for a in given for b in taken if 0 < costs[a] - costs[b] < gap and tokens[a] - tokens[b] <= room]
        best_move = min(moves, key=lambda p: abs(gap - 2 * costs[p]), default=None)
        best_swap = min(swaps, key=lambda s: abs(gap - 2 * (costs[s[0]] - costs[s[1]])), default=None)
        if best_move is None and best_swap is None:
            return
        move_gain = abs(gap - 2 * costs[best_move]) if best_move is not None else float("inf")
        swap_gain = abs(gap - 2 * (costs[best_swap[0]] - costs[best_swap[1]])) if best_swap is not None else float("inf")
        if min(move_gain, swap_gain) >= gap * (1 - 1e-9):
            return
        if best_move is not None and move_gain <= swap_gain:
            packing.move(best_move, dearest, cheapest)
        elif best_swap is not None:
            packing.move(best_swap[0], dearest, cheapest)
            packing.move(best_swap[1], cheapest, dearest)

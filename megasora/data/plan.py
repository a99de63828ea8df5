"""Which samples make up a step, and how they fall into packs. Pure arithmetic on token counts.

A step takes the next samples of the epoch's permutation until one more would exceed the token budget; that one opens the next step. An
epoch's last step may be short. The sampler's whole state is (epoch, consumed), and none of this knows of ranks: the layout only decides
how a step's samples fall into packs.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megasora.config.errors import UserError
from megasora.config.schema import DataConfig, EncodersConfig, ModelConfig
from megasora.data.buckets import choose_frames, choose_size, stride_to, token_grid
from megasora.data.decode import DecodeRequest
from megasora.data.manifest import Clip, SkippedRow


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedClip:
    """A clip with the shape it trains at."""

    clip: Clip
    num_frames: int
    height: int
    width: int
    stride: int
    grid: tuple[int, int, int]
    """Video tokens along (time, height, width)."""
    text_tokens: int

    @property
    def tokens(self) -> int:
        """Text and video tokens."""
        t, h, w = self.grid
        return self.text_tokens + t * h * w

    @property
    def fps(self) -> float | None:
        """Sampled frames per second; None for an image."""
        return self.clip.fps / self.stride if self.num_frames > 1 else None


def plan_clip(clip: Clip, *, data: DataConfig, encoders: EncodersConfig, patch_size: int) -> PlannedClip:
    """Shape a clip trains at.

    Raises:
        ValueError: it is too short for every allowed frame count, or larger than a step's budget.
    """
    stride = stride_to(clip.fps, target_fps=data.target_fps) if clip.num_frames > 1 else 1
    num_frames = choose_frames((clip.num_frames - 1) // stride + 1, frame_counts=data.frame_counts)
    if num_frames == 0:
        raise ValueError(f"{clip.num_frames} frames at stride {stride} fill none of {data.frame_counts}")
    _, _, crop_width, crop_height = clip.crop or (0, 0, clip.width, clip.height)
    unit = encoders.spatial_compression * patch_size
    height, width = _size_of(crop_height, crop_width, data.resolution, unit)
    planned = PlannedClip(
        clip=clip,
        num_frames=num_frames,
        height=height,
        width=width,
        stride=stride,
        grid=token_grid(
            num_frames,
            height,
            width,
            temporal_compression=encoders.temporal_compression,
            spatial_compression=encoders.spatial_compression,
            patch_size=patch_size,
        ),
        text_tokens=data.text_tokens,
    )
    if planned.tokens > data.global_tokens:
        raise ValueError(f"{planned.tokens} tokens exceed data.global_tokens {data.global_tokens}")
    return planned


@lru_cache(maxsize=4096)
def _size_of(height: int, width: int, resolution: str, multiple: int) -> tuple[int, int]:
    """`choose_size`, once per source size: manifests hold few sizes and many clips."""
    return choose_size(height, width, resolution=resolution, multiple=multiple)


def plan_clips(
    clips: Sequence[Clip], *, data: DataConfig, encoders: EncodersConfig, model: ModelConfig
) -> tuple[tuple[PlannedClip, ...], tuple[SkippedRow, ...]]:
    """Shapes of all clips that fit, and the ones that do not with the reason.

    Raises:
        UserError: none fits.
    """
    planned: list[PlannedClip] = []
    skipped: list[SkippedRow] = []
    for clip in clips:
        try:
            planned.append(plan_clip(clip, data=data, encoders=encoders, patch_size=model.patch_size))
        except UserError:
            raise
        except ValueError as error:
            skipped.append(SkippedRow(row=clip.row, reason=str(error)))
    if not planned:
        raise UserError(f"no clip can be used; the first: {skipped[0].reason}")
    return tuple(planned), tuple(skipped)


def request_of(clip: PlannedClip) -> DecodeRequest:
    """What to decode for a planned clip."""
    return DecodeRequest(
        path=clip.clip.path,
        start=clip.clip.start_frame,
        stride=clip.stride,
        num_frames=clip.num_frames,
        height=clip.height,
        width=clip.width,
        crop=clip.clip.crop,
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

    epoch: int
    samples: tuple[int, ...]
    state_after: SamplerState


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Permutation of the samples in an epoch: numpy's Philox generator keyed by (seed, epoch)."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed & 0xFFFFFFFFFFFFFFFF, epoch], dtype=np.uint64)))
    return generator.permutation(num_samples)


def next_step(tokens: Sequence[int], state: SamplerState, *, seed: int, global_tokens: int) -> StepPlan:
    """The samples of the step that starts at `state`.

    Args:
        tokens: token count of every sample, none above global_tokens.
        state: where the last step ended.
    """
    order = epoch_order(len(tokens), seed=seed, epoch=state.epoch)
    taken: list[int] = []
    total = 0
    position = state.consumed
    while position < len(order) and total + tokens[order[position]] <= global_tokens:
        taken.append(int(order[position]))
        total += tokens[order[position]]
        position += 1
    ended = position == len(order)
    after = SamplerState(epoch=state.epoch + 1) if ended else SamplerState(epoch=state.epoch, consumed=position)
    return StepPlan(epoch=state.epoch, samples=tuple(taken), state_after=after)


def sample_cost(tokens: int, *, hidden_size: int) -> float:
    """Forward FLOPs of a sample per block: 24 H^2 S + 4 S^2 H (facts section 1)."""
    return 24.0 * hidden_size**2 * tokens + 4.0 * tokens**2 * hidden_size


def assign_packs(tokens: Sequence[int], *, data_parallel_size: int, num_microbatches: int, hidden_size: int) -> list[list[tuple[int, ...]]]:
    """Packs of near-equal cost: [replica][micro-batch] -> places within the step, ascending; exactly DP x M packs, some may be empty.

    Longest first onto the cheapest pack, then single moves from the dearest pack while they lower the largest cost. Deterministic.
    """
    count = data_parallel_size * num_microbatches
    costs = [sample_cost(n, hidden_size=hidden_size) for n in tokens]
    packs: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    cheapest = [(0.0, k) for k in range(count)]  # already a heap
    for place in sorted(range(len(costs)), key=lambda p: (-costs[p], p)):
        load, target = cheapest[0]
        packs[target].append(place)
        loads[target] = load + costs[place]
        heapq.heapreplace(cheapest, (loads[target], target))
    _refine(packs, loads, costs)
    return [
        [tuple(sorted(packs[replica * num_microbatches + m])) for m in range(num_microbatches)] for replica in range(data_parallel_size)
    ]


def _refine(packs: list[list[int]], loads: list[float], costs: list[float], *, rounds: int = 64) -> None:
    for _ in range(rounds):
        dearest = max(range(len(packs)), key=lambda k: (loads[k], -k))
        cheapest = min(range(len(packs)), key=lambda k: (loads[k], k))
        gap = loads[dearest] - loads[cheapest]
        given, taken = ({costs[p]: p for p in reversed(packs[k])}.values() for k in (dearest, cheapest))  # one place of each cost
        moves = [place for place in given if 0 < costs[place] < gap]
        swaps = [(a, b) for a in given for b in taken if 0 < costs[a] - costs[b] < gap]
        best_move = min(moves, key=lambda p: abs(gap - 2 * costs[p]), default=None)
        best_swap = min(swaps, key=lambda s: abs(gap - 2 * (costs[s[0]] - costs[s[1]])), default=None)
        if best_move is None and best_swap is None:
            return
        move_gain = abs(gap - 2 * costs[best_move]) if best_move is not None else float("inf")
        swap_gain = abs(gap - 2 * (costs[best_swap[0]] - costs[best_swap[1]])) if best_swap is not None else float("inf")
        if min(move_gain, swap_gain) >= gap * (1 - 1e-9):
            return
        if best_move is not None and move_gain <= swap_gain:
            _shift(packs, loads, costs, best_move, dearest, cheapest)
        elif best_swap is not None:
            _shift(packs, loads, costs, best_swap[0], dearest, cheapest)
            _shift(packs, loads, costs, best_swap[1], cheapest, dearest)


def _shift(packs: list[list[int]], loads: list[float], costs: list[float], place: int, source: int, target: int) -> None:
    packs[source].remove(place)
    packs[target].append(place)
    loads[source] -= costs[place]
    loads[target] += costs[place]

"""The packs of a run's steps, as the run itself would plan them, without ranks and without reading a clip.

Where the clips come from:
    manifest  the recipe's data.manifest: real rows
    largest   nothing but the largest clip that the recipe's buckets allow: what published throughput tables are measured on
    drawn     clips as a curated set has them, drawn from a seed, through the recipe's own buckets and mix
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megasora.config.errors import UserError
from megasora.config.pack_tokens import largest_clip
from megasora.config.schema import RunConfig
from megasora.data.buckets import ASPECTS, height_by_width
from megasora.data.manifest import Clip, read_manifest
from megasora.data.plan import PlannedClip, SamplerState, assign_packs, mix_of, next_step, plan_clip, plan_clips
from megasora.parallel.pack import SampleShape
from megasora.scaling.settings import Clips as Clips

DRAWN = 4096
"""Clips drawn: enough for the shares of the buckets to settle within 2 %."""
SHORTEST_S, LONGEST_S = 2.0, 8.0
"""Length of curated clips (Open-Sora 2.0 report 2.1: shorter ones are dropped, longer ones cut); drawn evenly between."""
SOURCE_FPS = 24.0
"""Rate of the drawn clips: the recipes' target, so that no frame is passed over."""
SOURCE_PIXELS = 1920 * 1080
"""Pixels of the drawn clips (the report's shots have a long side of at most 1080 p sources)."""
DRAWN_IMAGES = 0.25
"""Share of the drawn rows that are images. The report gives no share for its video stages; choose --data.image_weight for another."""


@dataclass(frozen=True, kw_only=True)
class StepPacks:
    """One step of all replicas."""

    replicas: tuple[tuple[tuple[PlannedClip, ...], ...], ...]
    """Replica -> micro-batch -> clips; every replica has as many micro-batches, some may hold no clip."""
    filler: PlannedClip
    """What a rank computes where a micro-batch holds no clip: the smallest there is, with weight 0 (`training.feed`)."""

    @property
    def clips(self) -> list[PlannedClip]:
        """All clips of the step."""
        return [clip for packs in self.replicas for pack in packs for clip in pack]

    def computed(self, replica: int) -> list[tuple[PlannedClip, ...]]:
        """What a replica computes, one micro-batch after another."""
        return [pack or (self.filler,) for pack in self.replicas[replica]]

    @property
    def num_microbatches(self) -> int:
        """Of each replica."""
        return len(self.replicas[0])

    @property
    def tokens(self) -> int:
        """Text and video tokens of the step, without padding."""
        return sum(clip.tokens for clip in self.clips)


def shapes_of_pack(pack: Sequence[PlannedClip]) -> tuple[SampleShape, ...]:
    """What a pack is built from."""
    return tuple(SampleShape(text_tokens=clip.text_tokens, grid=clip.grid) for clip in pack)


def planned_clips(config: RunConfig, *, clips: Clips = "auto", seed: int = 0) -> tuple[PlannedClip, ...]:
    """The clips that a run's steps are filled from.

    Raises:
        UserError: there is no manifest, or no clip of it can be used, or the sizes of clips are not known without one.
    """
    kind = clips if clips != "auto" else "manifest" if config.data.manifest else "largest"
    if kind == "manifest":
        if config.data.manifest is None:
            raise UserError("there is no --data.manifest to take clips from; give one, or take --clips largest or drawn")
        rows: Sequence[Clip] = read_manifest(config.data.manifest).clips
    elif kind == "largest":
        return (_largest(config),)
    else:
        rows = drawn_clips(DRAWN, seed=seed)
    return plan_clips(rows, data=config.data, encoders=config.encoders, model=config.model)[0]


def drawn_clips(count: int, *, seed: int) -> list[Clip]:
    """Rows as a curated table has them: lengths and shapes drawn evenly, a share of images."""
    generator = np.random.default_rng(seed)
    shapes = [height_by_width(aspect) for aspect in ASPECTS]
    rows = []
    for row in range(count):
        ratio = shapes[int(generator.integers(len(shapes)))]
        seconds = generator.uniform(SHORTEST_S, LONGEST_S)
        frames = 1 if generator.uniform() < DRAWN_IMAGES else int(seconds * SOURCE_FPS)
        height = round(math.sqrt(SOURCE_PIXELS * ratio))
        rows.append(_row(row, frames=frames, height=height, width=round(height / ratio)))
    return rows


def _row(row: int, *, frames: int, height: int, width: int) -> Clip:
    return Clip(row=row, id=f"drawn{row}", path="", text="", num_frames=frames, height=height, width=width, fps=SOURCE_FPS)


def _largest(config: RunConfig) -> PlannedClip:
    found = largest_clip(config)
    if found is None:
        raise UserError("clips keep their own size (data.resolution manifest), so the largest is not known; give --data.manifest")
    frames, side = found
    names = [name for name, weight in config.data.resolution_mix if weight > 0] or [config.data.resolution]
    names += [name for name, *_ in config.data.bucket_mix]
    resolution = next(name for name in names if name.removesuffix("px") == f"{side:g}" or name.removesuffix("p") == f"{side * 3 / 4:g}")
    row = _row(0, frames=frames, height=int(side), width=int(side))
    return plan_clip(
        row,
        data=config.data,
        encoders=config.encoders,
        patch_size=config.model.patch_size,
        resolution=resolution,
        num_frames=frames,
    )


def steps_of(config: RunConfig, clips: Sequence[PlannedClip], *, world_size: int, steps: int = 1) -> list[StepPacks]:
    """The first steps of a run on these clips, taken over and over where they are few.

    Args:
        config: the run; its layout divides the world.
        clips: see `planned_clips`.
        world_size: ranks.
        steps: how many.
    """
    parallel, data = config.parallel, config.data
    tokens = [clip.tokens for clip in clips]
    mix = mix_of(clips, data) if len(clips) > 1 else None
    repeats = -(-data.global_tokens * (steps + 1) // max(1, sum(tokens)))
    if mix is None and repeats > 1:
        clips, tokens = tuple(clips) * repeats, tokens * repeats
    state, found = SamplerState(), []
    for _ in range(steps):
        plan = next_step(tokens, state, seed=config.train.seed, global_tokens=data.global_tokens, mix=mix)
        if plan.state_after.epoch > plan.position.epoch and state.consumed:  # an epoch's short last step shows nothing
            plan = next_step(tokens, plan.state_after, seed=config.train.seed, global_tokens=data.global_tokens, mix=mix)
        state = plan.state_after
        taken = [clips[sample] for sample in plan.samples]
        replicas = assign_packs(
            [clip.tokens for clip in taken],
            data_parallel_size=max(1, world_size // parallel.model_parallel_size),
            num_microbatches=data.num_microbatches,
            hidden_size=config.model.hidden_size,
            max_tokens=data.max_pack_tokens,
            microbatch_multiple=parallel.microbatch_multiple,
        )
        packs = tuple(tuple(tuple(taken[place] for place in pack) for pack in replica) for replica in replicas)
        found.append(StepPacks(replicas=packs, filler=min(clips, key=lambda clip: clip.tokens)))
    return found

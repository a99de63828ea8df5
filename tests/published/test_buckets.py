"""Sizes, frame counts and classes against Open-Sora's rule, written out here a second time: hpcaitech/Open-Sora at 7ad6a96,
opensora/datasets/bucket.py, aspect.py, utils.py and configs/diffusion/train."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from megasora import recipes
from megasora.config.schema import DataConfig, EncodersConfig, ModelConfig, RunConfig
from megasora.data.buckets import published_sizes
from megasora.data.cascade import Cascade
from megasora.data.manifest import Clip
from megasora.data.plan import PlannedClip, epoch_order, mix_of, plan_clips, request_of, start_of

FRAMES = range(5, 130, 4)
STAGE1 = {"256px": dict.fromkeys((1, *FRAMES), 1.0), "768px": {1: 0.5}, "1024px": {1: 0.5}}
"""configs/diffusion/train/stage1.py: probabilities of bucket_config."""
STAGE3 = {"256px": dict.fromkeys((1, *FRAMES), 1.0), "768px": dict.fromkeys((1, *FRAMES), 0.5)}
"""configs/diffusion/train/stage2_i2v.py."""
PAIRS = {"768px": {129: (0.4, 0.3), 65: (0.5, 0.25), 33: 0.7, 1: 0.2}, "256px": {129: (1.0, 0.6), 33: (0.9, 0.0), 5: 0.8, 1: 0.9}}
"""With (probability, skip) pairs, which the code knows and no published file has."""
NAMES = ["2.39:1", "2:1", "16:9", "1.85:1", "9:16", "5:8", "3:2", "4:3", "1:1"]

# -- the published rule ------------------------------------------------------------------------------------------------------------------


def table(name: str, unit: int) -> dict[str, tuple[int, int]]:
    """Sizes of a class, keyed as there, in that order."""
    wanted = int(name[:-2]) ** 2
    wide: dict[str, tuple[int, int]] = {}
    tall: dict[str, tuple[int, int]] = {}
    for ratio in NAMES:
        a, b = (float(part) for part in ratio.split(":"))
        w = int(math.sqrt(wanted * (a / b)) // unit) * unit
        h = int(wanted / w // unit) * unit
        start, best = (h, w), abs(h * w - wanted)
        for dh, dw in ((-unit, 0), (unit, 0), (0, -unit), (0, unit)):
            if abs((start[0] + dh) * (start[1] + dw) - wanted) < best:
                h, w = start[0] + dh, start[1] + dw
                best = abs(h * w - wanted)
        if (h, w) not in wide.values():
            wide[ratio] = (h, w)
            tall[":".join(ratio.split(":")[::-1])] = (w, h)
    wide.update(tall)
    return wide


def bucket(config: dict[str, Any], *, frames: int, height: int, width: int, fps: float, uniform: Any, unit: int = 16) -> Any:
    """(class, frames, (height, width)) of a row, or None; `uniform()` gives the next number of the row's generator."""
    interval = 1 if math.isnan(fps) or fps < 24 else math.ceil(fps / 24)
    count = frames // interval
    for name in sorted(config, key=lambda n: int(n[:-2]), reverse=True):
        sizes = table(name, unit)

        def shape(sizes: dict[str, tuple[int, int]] = sizes) -> tuple[int, int]:
            return sizes[min(sizes, key=lambda r: abs(height / width - float(r.split(":")[1]) / float(r.split(":")[0])))]

        if height * width < int(name[:-2]) ** 2 * 0.8:
            continue
        if count == 1:
            if 1 in config[name] and uniform() < config[name][1]:
                return name, 1, shape()
            continue
        for wanted in sorted(config[name], reverse=True):
            if count >= wanted and wanted != 1:
                keep = config[name][wanted]
                if isinstance(keep, tuple):
                    keep, on = keep
                    if on >= 1 or uniform() <= on:
                        continue
                if keep >= 1 or uniform() <= keep:
                    return name, wanted, shape()
                break
    return None


# -- random numbers for it ---------------------------------------------------------------------------------------------------------------


@dataclass
class Remainder:
    """One number in (0, 1) as a sequence of independent ones: a comparison that fails leaves the rest, stretched to (0, 1) again."""

    rest: float

    def __call__(self) -> Remainder:
        return self

    def _below(self, limit: float) -> bool:
        if self.rest < limit:
            self.rest /= limit
            return True
        self.rest = (self.rest - limit) / (1 - limit) if limit < 1 else self.rest
        return False

    __lt__ = __le__ = _below


@dataclass
class Branches:
    """Answers comparisons by a list of decisions and multiplies up how likely they are; runs out with the first undecided one."""

    decided: list[bool]
    likelihood: float = 1.0
    asked: int = field(default=0)

    def __call__(self) -> Branches:
        return self

    def _decide(self, limit: float) -> bool:
        if self.asked == len(self.decided):
            raise IndexError
        yes = self.decided[self.asked]
        self.asked += 1
        self.likelihood *= limit if yes else 1 - limit
        return yes

    __lt__ = __le__ = _decide


def distribution(config: dict[str, Any], **row: Any) -> dict[Any, float]:
    """Probability of each bucket of a row, by following every sequence of decisions."""
    found: Counter[Any] = Counter()
    open_ends: list[list[bool]] = [[]]
    while open_ends:
        decided = open_ends.pop()
        branches = Branches(decided)
        try:
            found[bucket(config, uniform=branches, **row)] += branches.likelihood  # type: ignore[assignment]
        except IndexError:
            open_ends += [[*decided, True], [*decided, False]]
    return {key: likelihood for key, likelihood in found.items() if likelihood > 0}


# -- ours --------------------------------------------------------------------------------------------------------------------------------


def rows(count: int) -> list[dict[str, Any]]:
    """Random rows: images without a rate and clips, sizes from below 0.8 x 256px to 4K, rates on both sides of the cap and on it."""
    rng = np.random.default_rng(20_260_101)
    found = []
    for number in range(count):
        image = number % 4 == 0
        height, width = (int(side) for side in np.exp(rng.uniform(np.log(160), np.log(2400), 2)))
        fps = math.nan if image else float(rng.choice([12.0, 23.976, 24.0, 25.0, 29.97, 30.0, 48.0, 59.94, 60.0]))
        frames = 1 if image else int(rng.integers(2, 500))
        found.append({"frames": frames, "height": height, "width": width, "fps": fps})
    return found


def clip(row: int, *, frames: int, height: int, width: int, fps: float) -> Clip:
    return Clip(id=str(row), path=f"{row}", text="", num_frames=frames, height=height, width=width, fps=fps, row=row)


def shapes(config: RunConfig, samples: list[dict[str, Any]]) -> dict[int, list[PlannedClip]]:
    """Planned shapes by row, without limits of tokens."""
    data = config.data.__class__(**{**vars_of(config.data), "global_tokens": 10**9})
    clips = [clip(number, **row) for number, row in enumerate(samples)]
    by_row: dict[int, list[PlannedClip]] = {number: [] for number in range(len(samples))}
    for planned in plan_clips(clips, data=data, encoders=config.encoders, model=config.model)[0]:
        by_row[planned.clip.row].append(planned)
    return by_row


def vars_of(data: DataConfig) -> dict[str, Any]:
    return {name: getattr(data, name) for name in data.__dataclass_fields__}


@pytest.mark.parametrize(("recipe", "config"), [("opensora2_stage1", STAGE1), ("opensora2_stage3", STAGE3)])
def test_random_rows_fall_into_the_published_bucket(recipe: str, config: dict[str, Any]) -> None:
    samples = rows(5_000)
    planned = shapes(recipes.get(recipe), samples)
    uniforms = np.random.default_rng(7).random(len(samples))
    seen: Counter[Any] = Counter()
    for number, (row, uniform) in enumerate(zip(samples, uniforms.tolist(), strict=True)):
        there = bucket(config, uniform=Remainder(uniform), **row)
        running, ours = 0.0, None
        for shape in planned[number]:
            running += shape.probability
            if uniform < running:
                ours = (shape.resolution, shape.num_frames, (shape.height, shape.width))
                break
        assert ours == there, row
        seen[there and there[:2]] += 1
    assert len(seen) > 30 and seen[None] > 100  # every frame count, every class, and rows that are left out


@pytest.mark.parametrize("config", [STAGE1, STAGE3, PAIRS], ids=["stage 1", "stage 3", "pairs"])
def test_every_shape_is_as_likely_as_there(config: dict[str, Any]) -> None:
    mix = tuple(
        (name, frames, *(keep if isinstance(keep, tuple) else (keep, 0.0)))
        for name, times in config.items()
        for frames, keep in times.items()
    )
    cascade = Cascade(mix, frame_counts=(1, *FRAMES))
    for frames, height, width in (
        (1, 1080, 1920),
        (1, 480, 640),
        (300, 720, 1280),
        (70, 768, 768),
        (40, 300, 300),
        (4, 720, 1280),
        (200, 99, 99),
    ):
        there = distribution(config, frames=frames, height=height, width=width, fps=20.0)
        by_count: Counter[Any] = Counter()
        for key, likelihood in there.items():
            by_count[key and key[:2]] += likelihood  # type: ignore[assignment]
        dropped = by_count.pop(None, 0.0)
        ours: Counter[Any] = Counter()
        for outcome in cascade.outcomes(available=frames, pixels=height * width):
            ours[outcome[:2]] += outcome.probability  # type: ignore[assignment]
        assert ours == pytest.approx(dict(by_count))
        assert 1 - sum(ours.values()) == pytest.approx(dropped, abs=1e-12)


def test_an_epoch_takes_each_shape_as_often_as_the_mix_says_and_leaves_out_the_rest() -> None:
    """An image of 1024 x 1024 stays at 1024px half of the times, else at 768px half of the times, else at 256px; 0.4 of the 256px here."""
    data = DataConfig(
        resolution="mix",
        buckets="published",
        bucket_mix=(("1024px", 1, 0.5, 0.0), ("768px", 1, 0.5, 0.0), ("256px", 1, 0.4, 0.0)),
        frame_counts=(1,),
        image_weight=2.0,
    )
    clips = [clip(number, frames=1, height=1024, width=1024, fps=math.nan) for number in range(4_000)]
    planned, _ = plan_clips(clips, data=data, encoders=EncodersConfig(), model=ModelConfig())
    order = epoch_order(len(planned), seed=3, epoch=0, mix=mix_of(planned, data))
    counts = Counter(planned[number].resolution for number in order)
    taken = 8_000  # each image twice
    for name, share in (("1024px", 0.5), ("768px", 0.25), ("256px", 0.25 * 0.4)):
        assert abs(counts[name] / taken - share) < 4 * math.sqrt(share * (1 - share) / taken)
    assert max(Counter(planned[number].clip.row for number in order).values()) == 2
    again = epoch_order(len(planned), seed=3, epoch=1, mix=mix_of(planned, data))
    assert Counter(order.tolist()) != Counter(again.tolist())


def landscape(name: str, unit: int) -> list[tuple[int, int]]:
    return sorted({size for size in published_sizes(name, unit).values() if size[0] <= size[1]})


def test_the_sizes_of_the_classes_are_the_published_ones() -> None:
    """The report's table and facts of its repository; 592 x 992 is 8:5, the landscape of the listed 5:8. With 32 pixels a token: of 768px
    16:9 sqrt(589,824 x 16 / 9) = 1,024 by 576; of 2.39:1 1,187.3 -> 1,184 by 480, nearer with 1,216 (583,680 for 568,320)."""
    assert landscape("256px", 16) == [(160, 400), (176, 368), (192, 336), (208, 320), (224, 288), (256, 256)]
    assert landscape("768px", 16) == [
        *[(496, 1184), (544, 1088), (560, 1056), (576, 1024)],
        *[(592, 992), (624, 944), (672, 880), (768, 768)],
    ]
    assert landscape("768px", 32) == [(480, 1216), (544, 1088), (576, 1024), (640, 928), (672, 864), (768, 768)]
    for name in ("256px", "768px"):
        portrait = {size for size in published_sizes(name, 16).values() if size[0] > size[1]}
        assert portrait == {(w, h) for h, w in landscape(name, 16) if h != w}
    # sqrt(480^2 x 16 / 9 x 16 / 9) = 853.3 -> 848 by 409,600 / 848 = 483 -> 480
    assert published_sizes("480p", 16)["16:9"] == (480, 848)


@pytest.mark.parametrize("unit", [16, 32])
@pytest.mark.parametrize("name", ["256px", "512px", "768px", "1024px"])
def test_a_class_is_computed_as_there(name: str, unit: int) -> None:
    assert list(published_sizes(name, unit).items()) == list(table(name, unit).items())


def test_frames_are_spread_over_whole_strides_from_a_drawn_start() -> None:
    """98 frames at 60 per second: stride 3 gives 32 and fills 29, over 87 frames, 86 / 28 apart; starts 0 to 98 - 87 - 1 (the last one, 11,
    is never drawn: opensora/datasets/video_transforms.py, TemporalRandomCrop)."""
    data = DataConfig(buckets="published", temporal_start="random", frame_counts=(29, 5, 1))
    (planned,), _ = plan_clips(
        [clip(0, frames=98, height=256, width=256, fps=60.0)], data=data, encoders=EncodersConfig(), model=ModelConfig()
    )
    assert (planned.stride, planned.num_frames, planned.span, planned.num_starts) == (3, 29, 87, 11)
    frames = request_of(planned, offset=4).frames.tolist()
    assert frames == [4 + 86 * place // 28 for place in range(29)]
    assert (frames[:3], frames[-1]) == ([4, 7, 10], 90)
    assert [start_of(planned, uniform=uniform) for uniform in (1e-9, 0.0910, 0.5, 1 - 1e-16)] == [0, 1, 5, 10]


def test_clips_below_the_class_are_left_out_of_one_class_and_of_a_mix_alike() -> None:
    """0.8 x 256^2 = 52,428.8: 229 x 229 = 52,441 stays, 228 x 229 = 52,212 does not."""
    clips = [clip(0, frames=40, height=229, width=229, fps=24.0), clip(1, frames=40, height=228, width=229, fps=24.0)]
    one = DataConfig(buckets="published")
    weighted = DataConfig(buckets="published", resolution_mix=(("256px", 1.0), ("768px", 1.0)))
    drawn = DataConfig(buckets="published", resolution="mix", bucket_mix=(("256px", 33, 1.0, 0.0),), frame_counts=(33,))
    for data in (one, weighted, drawn):
        planned, skipped = plan_clips(clips, data=data, encoders=EncodersConfig(), model=ModelConfig())
        assert [(shape.clip.row, shape.resolution) for shape in planned] == [(0, "256px")]
        assert [row.row for row in skipped] == [1]
    planned, _ = plan_clips(clips, data=DataConfig(), encoders=EncodersConfig(), model=ModelConfig())
    assert len(planned) == 2  # ours enlarges

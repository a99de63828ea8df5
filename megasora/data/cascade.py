"""The published mix of buckets: with what probability a clip trains at which class and frame count.

hpcaitech/Open-Sora opensora/datasets/bucket.py, get_bucket_id, as a distribution instead of a sequence of draws: the classes are tried by
descending pixels, those the clip has too few pixels for are passed over, an image or a frame count may be drawn or not, and what leaves the
last class is dropped. Where no entry has a skip, one uniform number inverted over `outcomes` in their order takes the same decisions as
the sequence does from that number's conditional remainders (tests/published/test_buckets.py).

Two differences in how it is drawn. The published sampler seeds a generator for each row with seed + epoch + row x buckets and draws for a
row once per epoch; ours draws for each clip and each time it is taken from one stream of the epoch. There every batch, so every rank,
weighs equally in a step, whatever it holds; here every sample does (training/microbatch.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megasora.data.buckets import LEAST_PIXELS, pixels_of

Entry = tuple[str, int, float, float]
"""(class, frames, probability, skip) of data.bucket_mix."""


class Outcome(NamedTuple):
    """A shape a clip may train at."""

    resolution: str
    num_frames: int
    probability: float
    """That it is this one, each time the clip is taken."""


class Cascade:
    """A mix of buckets, ready to be asked about many clips.

    Args:
        mix: data.bucket_mix.
        frame_counts: data.frame_counts; entries of other counts are left out.
    """

    def __init__(self, mix: Sequence[Entry], *, frame_counts: Sequence[int]) -> None:
        used = [entry for entry in mix if entry[1] in frame_counts]
        names = sorted(dict.fromkeys(entry[0] for entry in used), key=pixels_of, reverse=True)
        self._classes = [(name, pixels_of(name), _by_frames(used, name)) for name in names]
        self._known: dict[tuple[int, int], tuple[Outcome, ...]] = {}

    def outcomes(self, *, available: int, pixels: int) -> tuple[Outcome, ...]:
        """What may become of a clip, in the order in which the cascade tries it; the rest to 1 is the probability that it is dropped.

        Args:
            available: frames it has at its stride; 1 is an image.
            pixels: height x width of its picture.
        """
        passed_over = sum(pixels < size * LEAST_PIXELS for _, size, _ in self._classes)  # the largest ones
        place = (available, passed_over)
        if place not in self._known:
            self._known[place] = self._outcomes(available, passed_over)
        return self._known[place]

    def _outcomes(self, available: int, passed_over: int) -> tuple[Outcome, ...]:
        found: list[Outcome] = []
        reached = 1.0
        """Probability that the class is tried."""
        for name, _, entries in self._classes[passed_over:]:
            if available == 1:
                probability, _ = entries.get(1, (0.0, 0.0))
                found.append(Outcome(name, 1, reached * probability))
                reached *= 1 - probability
                continue
            here, left = reached, 0.0
            for frames, (probability, skip) in entries.items():
                if frames > available or frames == 1:
                    continue
                found.append(Outcome(name, frames, here * (1 - skip) * probability))
                left += here * (1 - skip) * (1 - probability)
                here *= skip
            reached = here + left
        return tuple(outcome for outcome in found if outcome.probability > 0)


def _by_frames(entries: Sequence[Entry], name: str) -> dict[int, tuple[float, float]]:
    """(probability, skip) by frame count of a class, descending."""
    own = {frames: (probability, skip) for resolution, frames, probability, skip in entries if resolution == name}
    return dict(sorted(own.items(), reverse=True))


def decisions(mix: Sequence[Entry]) -> tuple[str, ...]:
    """What of a mix decides which shapes clips may get, whatever their likelihood: '768px 33 sometimes never' (kept, moved on)."""

    def word(probability: float) -> str:
        return "always" if probability >= 1 else "sometimes" if probability > 0 else "never"

    return tuple(f"{name} {frames} {word(probability)} {word(skip)}" for name, frames, probability, skip in mix)

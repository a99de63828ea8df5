"""Means with their uncertainty: bootstrap for any measure, Wilson's interval for shares. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
"""Enough for the second digit of an interval's ends (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 14.3: 1,000
at least for percentiles)."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One measure over clips."""

    count: int
    mean: float
    std: float | None
    """Of the sample (n - 1); None for one clip."""
    low: float | None
    high: float | None
    """Ends of the 95 % percentile bootstrap interval of the mean; None for one clip."""

    @property
    def standard_error(self) -> float | None:
        """Of the mean: std / sqrt(count)."""
        return None if self.std is None else self.std / sqrt(self.count)


def summarise(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Summary:
    """Mean, standard deviation and the 95 % bootstrap interval of the mean (percentile method, clips drawn with replacement).

    Args:
        values: one finite number per clip, at least one.
        seed: of the draws, so that a report can be repeated.
        resamples: draws of len(values) clips.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("a summary needs at least one value")
    given = np.asarray(values, dtype=np.float64)
    if len(given) == 1:
        return Summary(count=1, mean=float(given[0]), std=None, low=None, high=None)
    generator = np.random.default_rng(seed)
    means = np.array([given[generator.integers(0, len(given), len(given))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Summary(count=len(given), mean=float(given.mean()), std=float(given.std(ddof=1)), low=float(low), high=float(high))


def wilson_interval(successes: int, trials: int, *, level: float = LEVEL) -> tuple[float, float]:
    """Ends of Wilson's score interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22, 209-212): right for few votes and near 0 and 1.

    Args:
        successes: in [0, trials].
        trials: at least 1.
        level: probability that the interval covers the share.

    Raises:
        ValueError: the counts are impossible.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} of {trials} is no share")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if successes == 0 else (centre - half) / scale
    return low, 1.0 if successes == trials else (centre + half) / scale
